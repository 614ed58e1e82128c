"""A folder or file share as a target: plain files, ready to load, one folder a publication.

    ROOT/NAME/VARIANT/<digest12>/     the files; modelpack.json, put last, is the manifest with their hashes
    ROOT/NAME/VARIANT/current         the digest that a reference without one means

In: blobs and a manifest. Out: files that appear whole, each by one rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from quantize.errors import TransferError, VerifyError
from quantize.publish.base import Count, Found, Place, moved_meanwhile, size_of, split_digest, write_stream
from quantize.publish.pack import MANIFEST_NAME, Blob, Pack
from quantize.publish.retry import Retry
from quantize.system.cache import hash_file
from quantize.system.digest import digest_of, from_digits, is_short, is_whole, short
from quantize.system.files import existing_parent
from quantize.system.flock import NO_LOCKS, NO_LOCKS_HINT, file_lock

CURRENT = "current"
LOCK = ".current.lock"
READ_BYTES = 4 << 20


class FolderPlace:
    """One variant's folder in a share."""

    by_content = False

    def __init__(self, root: Path) -> None:
        self._root = root

    @classmethod
    def to_publish(cls, target: str, name: str, variant: str, retry: Retry) -> FolderPlace:  # noqa: ARG003 - copies once
        """See Place."""
        return cls(_path(target) / name / variant)

    @classmethod
    def to_fetch(cls, reference: str, retry: Retry) -> Found:  # noqa: ARG003 - copies once
        """See Place."""
        return find_in_tree(reference, lambda text: cls(_path(text)))

    def close(self) -> None:
        """Nothing is open."""

    @property
    def name(self) -> str:
        """The folder."""
        return str(self._root)

    @property
    def title(self) -> str:
        """The recipe's folder in the share."""
        return self._root.parent.name

    def pinned(self, digest: str) -> str:
        """The folder and a digest."""
        return f"{self._root}@{digest}"

    def _folder(self, digest: str) -> Path:
        return self._root / short(digest)

    def tagged(self) -> str | None:
        """What `current` says."""
        with _errors(self._root), contextlib.suppress(FileNotFoundError):
            return checked_digest((self._root / CURRENT).read_bytes(), self.name)
        return None

    def manifest(self, digest: str) -> bytes:
        """The bytes of modelpack.json. Raises VerifyError: not there."""
        with _errors(self._root):
            try:
                return (self._folder(digest) / MANIFEST_NAME).read_bytes()
            except FileNotFoundError:
                raise missing(self.pinned(digest)) from None

    def has(self, blob: Blob, pack: Pack) -> bool:
        """Whether the file is there with its size and hash."""
        path = self._folder(pack.digest) / blob.path
        with _errors(self._root):
            return path.is_file() and path.stat().st_size == blob.size_bytes and hash_file(path) == blob.sha256

    def send(self, blob: Blob, source: Path, pack: Pack, count: Count) -> None:
        """Copy one file, hashing it on the way; what another publication has is linked, where links work."""
        final = self._folder(pack.digest) / blob.path
        if self._link(blob, final):
            count(blob.size_bytes)
            return
        scratch = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.part")
        digest = hashlib.sha256()

        def chunks() -> Iterator[bytes]:
            for chunk in read_chunks(source):
                digest.update(chunk)
                yield chunk

        with _errors(self._root):
            _make(final.parent)
            try:
                write_stream(scratch, chunks(), blob, count, append=False)
                if digest.hexdigest() != blob.sha256:
                    raise TransferError(f"{source} changed while it was sent", hint="run the same command again")
                scratch.replace(final)
            finally:
                scratch.unlink(missing_ok=True)

    def _link(self, blob: Blob, final: Path) -> bool:
        for other in self._same(blob, final):
            scratch = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.part")
            with contextlib.suppress(OSError):
                final.parent.mkdir(parents=True, exist_ok=True)
                scratch.hardlink_to(other)
                scratch.replace(final)
                scratch.unlink(missing_ok=True)  # where both were the same file, nothing was renamed
                return True
        return False

    def _same(self, blob: Blob, final: Path) -> Iterator[Path]:
        """Files of other publications with the same bytes."""
        for other in [item / blob.path for item in self._root.iterdir()] if self._root.is_dir() else []:
            if other != final and size_of(other) == blob.size_bytes and hash_file(other) == blob.sha256:
                yield other

    def takes(self, blob: Blob, pack: Pack) -> int:
        """Nothing for what can be linked."""
        found = next(self._same(blob, self._folder(pack.digest) / blob.path), None)
        return blob.size_bytes if found is None else 0

    def free_bytes(self) -> int | None:
        """What the file system has left; one without a size, such as /proc, does not say."""
        with _errors(self._root):
            usage = shutil.disk_usage(existing_parent(self._root))
        return usage.free if usage.total else None

    def known(self) -> list[str]:
        """Variants below a recipe's folder, or those of all recipes of a share."""
        found = [path.parent for depth in ("*", "*/*") for path in self._root.glob(f"{depth}/{CURRENT}")]
        return sorted(map(str, found))

    def seal(self, pack: Pack, *, move_from: str | None) -> str:
        """Write modelpack.json, then `current`: under a lock, so that of two that move it the second sees the first."""
        with _errors(self._root):
            self._write(self._folder(pack.digest) / MANIFEST_NAME, pack.document)
            with self._alone():
                now = self.tagged()
                if now not in (move_from, pack.digest):
                    raise moved_meanwhile(self.name, move_from, now)
                if now != pack.digest:
                    self._write(self._root / CURRENT, f"{pack.digest}\n".encode())
        return self.pinned(pack.digest)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        lock = file_lock(self._root / LOCK)
        try:
            lock.acquire()
        except OSError as exc:
            if exc.errno not in NO_LOCKS:
                raise
            raise TransferError(f"{self._root}: no lock is to be had", hint=NO_LOCKS_HINT) from exc
        try:
            yield
        finally:
            lock.release()

    def _write(self, path: Path, data: bytes) -> None:
        scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
        scratch.write_bytes(data)
        scratch.replace(path)

    def fetch(self, blob: Blob, target: Path, pack: Pack, count: Count) -> None:
        """Copy one file, on from what is there."""
        path, start = self._folder(pack.digest) / blob.path, size_of(target)
        with _errors(self._root):
            if not path.is_file():
                raise VerifyError(f"{blob.path} is missing in {path.parent}", hint="publish the artifact again")
            write_stream(target, read_chunks(path, start), blob, count, append=True)


def read_chunks(path: Path, start: int = 0) -> Iterator[bytes]:
    """A file's bytes from `start`, piece by piece."""
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(READ_BYTES):
            yield chunk


def checked_digest(data: bytes, where: str) -> str:
    """The digest that a `current` file holds. Raises VerifyError: it holds none."""
    text = data[:200].decode(errors="replace").strip()
    if not is_whole(text):
        raise VerifyError(f"{where}: its `{CURRENT}` holds {text[:80]!r}, which is no digest")
    return text


def missing(reference: str) -> VerifyError:
    """Nothing was published there."""
    return VerifyError(f"{reference}: there is no such publication", hint="was it published there?")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as exc:  # a file system that has no such folders to make: /proc, a share that went away
        raise TransferError(f"{folder}: can't be made", hint="publish to a folder that can be written") from exc


@contextlib.contextmanager
def _errors(root: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as exc:
        hint = "run the same command again when that is put right: what has arrived is not sent again"
        raise TransferError(f"{root}: {exc.strerror or exc} ({exc.filename or 'no file'})", hint=hint) from exc


def _path(text: str) -> Path:
    return Path(text.removeprefix("file://")).expanduser()


def find_in_tree(reference: str, open_place: Callable[[str], Place]) -> Found:
    """What a reference to a tree of folders means: a variant's folder, with or without a digest, or one publication's,
    as a share shows it. Raises VerifyError: the folder's manifest is not the one that it is named by.
    """
    above, _, folder = reference.rstrip("/").rpartition("/")
    found = _one_publication(open_place(above), folder) if above and is_short(folder) else None
    if found is not None:
        return found
    text, digest = split_digest(reference)
    return Found(open_place(text), digest)


def _one_publication(place: Place, folder: str) -> Found | None:
    try:
        digest = digest_of(place.manifest(from_digits(folder)))
    except VerifyError:  # a variant that is called so
        return None
    if short(digest) != folder:
        hint = "publish the artifact again, or name another publication"
        where = f"{place.name}/{folder}"
        raise VerifyError(f"{where}: its manifest is not the one that the folder is named by", hint=hint)
    return Found(place, digest)
