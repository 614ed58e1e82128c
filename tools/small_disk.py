"""A real file system that is as small as one likes: a tmpfs of one's own, whose size can change while it is in use."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

MS_RDONLY, MS_REMOUNT = 1, 32  # of <sys/mount.h>
PAGE_BYTES = 4096


class SmallDisk:
    """A mounted tmpfs at `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resize(self, size_bytes: int) -> None:
        """Make the file system larger or smaller; it can't become smaller than what it holds."""
        while not self._remount(f"size={max(size_bytes, self.used_bytes, PAGE_BYTES)}"):
            continue  # more was written meanwhile

    def set_read_only(self, read_only: bool) -> None:
        """Have every write refused, or no more."""
        if not self._remount("", MS_RDONLY if read_only else 0):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def _remount(self, options: str, flags: int = 0) -> bool:
        mount = ctypes.CDLL(None, use_errno=True).mount
        return bool(mount(b"tmpfs", bytes(self.folder), b"tmpfs", MS_REMOUNT | flags, options.encode()) == 0)

    @property
    def used_bytes(self) -> int:
        """Bytes that are taken, those of deleted files that are still open too."""
        found = os.statvfs(self.folder)
        return (found.f_blocks - found.f_bfree) * found.f_frsize


class LoopDisk(SmallDisk):
    """An ext4 in a file, which lays data out late; it becomes smaller by a file that takes what is to be gone."""

    def resize(self, size_bytes: int) -> None:
        """Have so many bytes for others than that file."""
        self._ballast.unlink(missing_ok=True)
        found = os.statvfs(self.folder)
        gone = found.f_bavail * found.f_frsize - max(0, size_bytes - self.used_bytes)
        if gone <= 0:
            return
        with self._ballast.open("wb") as file:
            while gone > PAGE_BYTES:
                try:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, gone)
                    return
                except OSError:  # more was written meanwhile, or what describes the blocks takes some as well
                    gone //= 2

    @property
    def used_bytes(self) -> int:
        """Bytes that are taken, but for that file's."""
        ballast = self._ballast.stat().st_blocks * 512 if self._ballast.exists() else 0
        return super().used_bytes - ballast

    @property
    def _ballast(self) -> Path:
        return self.folder / "ballast"


@contextmanager
def loop_disk(folder: Path, size_bytes: int) -> Iterator[LoopDisk]:
    """Make and mount an ext4 at a folder, in a sparse file beside it. Raises CalledProcessError, OSError."""
    folder.mkdir(parents=True)
    image = folder.with_suffix(".image")
    with image.open("wb") as file:
        file.truncate(size_bytes)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", image, folder], check=True, capture_output=True)
    try:
        yield LoopDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True, capture_output=True)
        image.unlink()


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[SmallDisk]:
    """Mount one at a folder, which is made. Raises CalledProcessError where that is not allowed."""
    folder.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", folder], check=True, capture_output=True
    )
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True, capture_output=True)


@cache
def why_not() -> str:
    """Why no file system can be mounted here; "" if one can."""
    with TemporaryDirectory() as scratch:
        try:
            with small_disk(Path(scratch) / "disk", 1 << 20):
                return ""
        except (OSError, subprocess.CalledProcessError) as exc:
            return f"a file system can't be mounted here ({exc})"
