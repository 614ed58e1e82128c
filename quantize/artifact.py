"""A build's folder from staging to its place in the store: filled out of sight, synced, then one rename.

In: a store root and a variant. Out: a complete artifact folder, or nothing. Names on disk are decided here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.cache import hash_file
from quantize.errors import QuantizeError, StoreError
from quantize.manifest import EVALUATION_NAME, FILE_NAME, MEASUREMENTS_NAME, FileEntry, Manifest, read_manifest

STAGING = ".staging"
LOCKS = ".locks"
SCRATCH = ".scratch"  # ends the name of the folder beside a staging folder that a build works in
CURRENT = "current"
REFUSED = "refused"  # folder beside a variant's good builds: those that its gates refused
UNJUDGED = ".unjudged"  # the same for builds that are complete and verified, and have no figures yet
ASIDE = (UNJUDGED, REFUSED)
LOCK_POLL_SECONDS = 0.1
MKDIR_TRIES = 10_000  # each takes microseconds; only a store whose root can not be made uses them up


@dataclass(frozen=True)
class Artifact:
    """A finished artifact on disk."""

    folder: Path
    manifest: Manifest

    @property
    def ref(self) -> str:
        """name/variant@digest12: names it wherever the store is."""
        return f"{self.manifest.name}/{self.manifest.variant}@{self.manifest.short_digest}"

    def measurements(self) -> dict[str, Any]:
        """What was measured when and where; {} if nothing was."""
        return read_measurements(self.folder)


def read_measurements(folder: Path) -> dict[str, Any]:
    """What measurements.json of a folder holds; {} where it is not there or not readable."""
    with contextlib.suppress(OSError, ValueError):
        data = json.loads((folder / MEASUREMENTS_NAME).read_text(encoding="utf-8"))
        if isinstance(data, dict):
            return data
    return {}


def open_artifact(folder: Path) -> Artifact:
    """Read an artifact's manifest. Raises VerifyError."""
    return Artifact(folder, read_manifest(folder / FILE_NAME))


def variant_folder(store: Path, name: str, variant: str) -> Path:
    """Where the builds of a variant are."""
    return store / name / variant


@contextlib.contextmanager
def store_errors(store: Path) -> Iterator[None]:
    """Turn the system's errors into ours: disk full, read-only, no permission, name too long."""
    try:
        yield
    except QuantizeError:
        raise
    except OSError as exc:
        hints = {
            errno.ENOSPC: "free some space and run the same build again",
            errno.EDQUOT: "your quota is used up: free some space and run the same build again",
            errno.EROFS: "the store is on a read-only file system: choose another with --store",
            errno.EACCES: "check its permissions, or choose another with --store",
            errno.ENAMETOOLONG: "use a shorter recipe or variant name, or a store nearer to the root",
        }
        message = f"store {store}: {exc.strerror or exc} ({exc.filename or 'no file'})"
        raise StoreError(message, hint=hints.get(exc.errno or 0, "nothing that was there is lost")) from exc


@contextlib.contextmanager
def variant_lock(store: Path, name: str, variant: str) -> Iterator[None]:
    """Hold the one lock of a variant; waits while another build has it. Raises StoreError where locks don't work.

    The lock's file is gone afterwards. It is removed before the lock is released, and filelock takes no lock on a
    file that was removed meanwhile, so those who wait for it go on to the next file of that name.
    """
    from filelock import FileLock

    path = lock_path(store, name, variant)
    lock = FileLock(path, poll_interval=LOCK_POLL_SECONDS)
    with store_errors(store):
        while not lock.is_locked:
            _make_folder(path.parent)
            try:
                lock.acquire()
            except (FileNotFoundError, FileExistsError):
                continue  # another build has just removed, or made, the empty folder
            except NotImplementedError as exc:
                hint = "put the store on a local disk, or one whose file system has locks"
                raise StoreError(f"store {store}: this file system has no locks", hint=hint) from exc
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
        _remove_if_empty(path.parent, store)


def lock_path(store: Path, name: str, variant: str) -> Path:
    """Where a variant's lock is while it is held."""
    return store / LOCKS / f"{name}--{variant}.lock"


def staged_variant(folder_name: str) -> str:
    """`name--variant` of a staging or scratch folder's name."""
    return folder_name.removesuffix(SCRATCH).rpartition(".")[0]


@contextlib.contextmanager
def staging_folder(store: Path, name: str, variant: str) -> Iterator[Path]:
    """An empty folder on the store's own file system; what is still in it at the end is removed.

    Only call under the variant's lock: what a killed build of it left behind is removed first.
    """
    root = store / STAGING
    with store_errors(store):
        clear_leftovers(store, name, variant)
        folder = root / f"{name}--{variant}.{uuid.uuid4().hex[:8]}"
        _make_folder(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _remove_if_empty(root, store)


def settle(store: Path, artifact: Artifact) -> None:
    """Make good what a build that was killed just after its commit left: its scratch folder, its lock, `current`.

    Does nothing where there is nothing to do, where a running build holds the variant, or where the store is read-only.
    """
    from filelock import FileLock, Timeout

    name, variant = artifact.manifest.name, artifact.manifest.variant
    path, link = lock_path(store, name, variant), artifact.folder.parent / CURRENT
    current = link.is_symlink() and os.readlink(link) == artifact.folder.name
    if current and not path.exists() and not _leftovers(store, name, variant):
        return
    lock = FileLock(path)
    try:
        _make_folder(path.parent)
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return
    try:
        clear_leftovers(store, name, variant)
        if not current:
            point_current(artifact.folder)
    finally:
        path.unlink(missing_ok=True)
        lock.release()
        _remove_if_empty(path.parent, store / STAGING)


def clear_leftovers(store: Path, name: str, variant: str) -> None:
    """Remove what a killed build of a variant left in staging. Only call under the variant's lock."""
    for leftover in _leftovers(store, name, variant):
        shutil.rmtree(leftover, ignore_errors=True)
    _remove_if_empty(store / STAGING)


def _leftovers(store: Path, name: str, variant: str) -> list[Path]:
    root, wanted = store / STAGING, f"{name}--{variant}"
    return [item for item in root.glob(f"{wanted}.*") if staged_variant(item.name) == wanted]


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, while other builds may be removing them because they are empty."""
    for _ in range(MKDIR_TRIES):
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            folder.mkdir(parents=True)
        if folder.is_dir():
            return
    folder.mkdir(parents=True)


def _remove_if_empty(*folders: Path) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def describe_files(folder: Path, names: tuple[str, ...]) -> tuple[FileEntry, ...]:
    """Size and hash of each named file, sorted by path."""
    return tuple(
        FileEntry(path=name, size_bytes=(folder / name).stat().st_size, sha256=hash_file(folder / name))
        for name in sorted(names)
    )


def write_text(path: Path, text: str) -> None:
    """Write a file through a scratch name and one rename."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def write_measurements(folder: Path, measurements: Mapping[str, Any]) -> None:
    """Write measurements.json, whole or not at all."""
    text = json.dumps(measurements, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_text(folder / MEASUREMENTS_NAME, text)


def update_measurements(store: Path, artifact: Artifact, changes: Mapping[str, Any]) -> None:
    """Put some keys into an artifact's measurements.json, the others stay. Raises StoreError."""
    name, variant = artifact.manifest.name, artifact.manifest.variant
    inside = artifact.folder.absolute().is_relative_to(store.absolute())
    with variant_lock(store, name, variant) if inside else contextlib.nullcontext(), store_errors(store):
        write_measurements(artifact.folder, {**artifact.measurements(), **changes})


def commit(store: Path, folder: Path, manifest: Manifest) -> Artifact:
    """Put a complete folder, staged or set aside, in its place and point `current` at it.

    If the same digest is there already and intact, its weights stay; only what was measured anew goes with it.
    Raises StoreError.
    """
    with store_errors(store):
        write_text(folder / FILE_NAME, manifest.to_json())
        sync_tree(folder)
        final = variant_folder(store, manifest.name, manifest.variant) / manifest.short_digest
        final.parent.mkdir(parents=True, exist_ok=True)
        if folder != final and _is_intact(final, manifest):
            _take_figures(folder, final)
        elif folder != final:
            _replace(store, final, folder, manifest)
        point_current(final)
        _sync(final.parent)
        _remove_if_empty(folder.parent, final.parent)
    return Artifact(final, manifest)


def set_aside(store: Path, folder: Path, manifest: Manifest, place: str) -> Artifact:
    """Put a complete folder into REFUSED or UNJUDGED, where it counts as no build of its variant. Raises StoreError.

    A good build of the same digest is the same files: it goes from where it was, and `current` to the newest other one.
    """
    variant = variant_folder(store, manifest.name, manifest.variant)
    final, good = variant / place / manifest.short_digest, variant / manifest.short_digest
    with store_errors(store):
        write_text(folder / FILE_NAME, manifest.to_json())
        sync_tree(folder)
        final.parent.mkdir(parents=True, exist_ok=True)
        if place == REFUSED and good.exists():
            _point_elsewhere(good)
        if final != folder:
            _replace(store, final, folder, manifest)
        if place == REFUSED and good.exists():
            shutil.rmtree(good)
        _sync(final.parent)
        _remove_if_empty(folder.parent)
    return Artifact(final, manifest)


def _replace(store: Path, final: Path, folder: Path, manifest: Manifest) -> None:
    """Rename a folder to its final name; what has that name goes, after it."""
    damaged = store / STAGING / f"{manifest.name}--{manifest.variant}.{uuid.uuid4().hex[:8]}{SCRATCH}"
    if final.exists():
        _make_folder(damaged.parent)
        final.rename(damaged)
    folder.rename(final)
    shutil.rmtree(damaged, ignore_errors=True)
    _remove_if_empty(damaged.parent)


def _take_figures(folder: Path, final: Path) -> None:
    """Move what was measured of the same files to where they already are; what is known only there stays."""
    if (folder / EVALUATION_NAME).is_file():
        write_measurements(final, {**read_measurements(final), **read_measurements(folder)})
        (folder / EVALUATION_NAME).replace(final / EVALUATION_NAME)
    shutil.rmtree(folder)


def _point_elsewhere(good: Path) -> None:
    """Have `current` point at the newest other build of the variant, or at none."""
    link = good.parent / CURRENT
    if not link.is_symlink() or os.readlink(link) != good.name:
        return
    others = [item for item in good.parent.iterdir() if item != good and (item / FILE_NAME).is_file() and item != link]
    if others:
        point_current(max(others, key=lambda item: (item / FILE_NAME).stat().st_mtime))
    else:
        link.unlink()


def _is_intact(folder: Path, manifest: Manifest) -> bool:
    names = tuple(entry.path for entry in manifest.files)
    if not all((folder / name).is_file() for name in (FILE_NAME, *names)):
        return False
    same_manifest = (folder / FILE_NAME).read_bytes() == manifest.to_json().encode()
    return same_manifest and describe_files(folder, names) == manifest.files


def point_current(final: Path) -> None:
    """Make `current` a relative link to an artifact's folder, in one step."""
    link = final.parent / CURRENT
    scratch = final.parent / f".{CURRENT}.{uuid.uuid4().hex[:8]}"
    scratch.symlink_to(final.name)
    scratch.replace(link)


def sync_tree(folder: Path) -> None:
    """Have every file and folder below on disk before anything points at it."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
