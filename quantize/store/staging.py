"""Where a build works: the lock of its variant, the folders that it fills, what a killed one left in them.

In: a store root, a recipe's name, a variant's. Out: folders on the store's own file system, of one build at a time.
What becomes of a filled folder is artifact.py's. A folder with RESUME_NAME in it is kept for the next build.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import QuantizeError, StoreError, disk_full, is_disk_full
from quantize.system.files import write_durable
from quantize.system.flock import NO_LOCKS, NO_LOCKS_HINT, file_lock

STAGING = ".staging"
LOCKS = ".locks"
WORK = ".work"  # ends the name of a variant's staging folder
PASS = "+pass"  # stands for a variant's name, and can't be one: the calibration pass of a recipe
SCRATCH = ".scratch"  # ends the name of the folder beside it for what is not published
INPUTS_NAME = "inputs.json"  # in scratch: what goes into the build key
RESUME_NAME = "resume.json"  # in scratch, where there is something to go on from
LOCK_POLL_SECONDS = 0.1
MKDIR_TRIES = 10_000  # each takes microseconds; only a store whose root can not be made uses them up


@contextlib.contextmanager
def store_errors(store: Path) -> Iterator[None]:
    """Turn the system's errors into StoreError: read-only, no permission, name too long; disk full: DiskFullError."""
    try:
        yield
    except QuantizeError:
        raise
    except OSError as exc:
        if is_disk_full(exc):
            raise disk_full(exc, store) from exc
        hints = {
            errno.EROFS: "the store is on a read-only file system: choose another with --store",
            errno.EACCES: "check its permissions, or choose another with --store",
            **dict.fromkeys(NO_LOCKS, NO_LOCKS_HINT),
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
    path = lock_path(store, name, variant)
    lock = file_lock(path, poll_seconds=LOCK_POLL_SECONDS)
    with store_errors(store):
        while not lock.is_locked:
            make_folder(path.parent)
            try:
                lock.acquire()
            except (FileNotFoundError, FileExistsError):
                continue  # another build has just removed, or made, the empty folder
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
        remove_if_empty(path.parent, store)


def lock_path(store: Path, name: str, variant: str) -> Path:
    """Where a variant's lock is while it is held."""
    return store / LOCKS / f"{name}--{variant}.lock"


def staged_variant(folder_name: str) -> str:
    """`name--variant` of a staging or scratch folder's name."""
    return folder_name.removesuffix(SCRATCH).rpartition(".")[0]


@dataclass(frozen=True)
class Workplace:
    """Where one build of a variant works. staging: the artifact to be. scratch: what is not published.

    changed: what differs from a build that was stopped half-way, whose work is therefore of no use; () for none.
    """

    staging: Path
    scratch: Path
    changed: tuple[str, ...] = ()


@contextlib.contextmanager
def workplace(store: Path, name: str, variant: str, inputs: Mapping[str, Any], *, anew: bool) -> Iterator[Workplace]:
    """Folders on the store's own file system, with what a stopped build of the same `inputs` left to go on from.

    Only call under the variant's lock: all else that a stopped build left is removed first. At the end the folders are
    removed, unless staging is still there beside a RESUME_NAME: then the next build goes on from it. anew: don't.
    Raises StoreError.
    """
    staging = store / STAGING / f"{name}--{variant}{WORK}"
    scratch = staging.with_name(staging.name + SCRATCH)
    text = json.dumps(inputs, sort_keys=True, indent=1, ensure_ascii=False)
    with store_errors(store):
        changed = _changed(scratch, inputs)
        keep = changed == () and not anew and (scratch / RESUME_NAME).is_file()
        clear_leftovers(store, name, variant, keep=(staging, scratch) if keep else ())
        for folder in (staging, scratch):
            make_folder(folder)
        write_durable(scratch / INPUTS_NAME, text)
    try:
        yield Workplace(staging, scratch, changed or ())
    finally:
        if not (staging.is_dir() and (scratch / RESUME_NAME).is_file()):
            shutil.rmtree(staging, ignore_errors=True)
            shutil.rmtree(scratch, ignore_errors=True)
        remove_if_empty(store / STAGING, store)


@contextlib.contextmanager
def pass_workplace(store: Path, name: str) -> Iterator[Path]:
    """The folder of a recipe's calibration pass, under its lock; `clear_pass` removes it.

    Only call under the locks of the variants that take part. Raises StoreError.
    """
    folder = store / STAGING / f"{name}--{PASS}{WORK}"
    with variant_lock(store, name, PASS):
        with store_errors(store):
            make_folder(folder)
        yield folder


def clear_pass(store: Path, name: str) -> None:
    """Remove the folder of a recipe's calibration pass, unless a build runs or can go on from where it stopped."""
    from filelock import Timeout

    folder = store / STAGING / f"{name}--{PASS}{WORK}"
    waiting = {staged_variant(path.parent.name) for path in (store / STAGING).glob(f"{name}--*/{RESUME_NAME}")}
    if not folder.is_dir() or waiting - {f"{name}--{PASS}"}:
        return
    path = lock_path(store, name, PASS)
    try:
        make_folder(path.parent)
        with file_lock(path, timeout=0):
            shutil.rmtree(folder, ignore_errors=True)
            path.unlink(missing_ok=True)
    except (Timeout, OSError):
        return
    remove_if_empty(path.parent, store / STAGING)


def _changed(scratch: Path, inputs: Mapping[str, Any]) -> tuple[str, ...] | None:
    """What differs from the inputs of the build that left `scratch`; None where it left nothing to go on from."""
    if not (scratch / RESUME_NAME).is_file():
        return None
    return differences(read_json(scratch / INPUTS_NAME), inputs)


def differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> tuple[str, ...]:
    """Each value that differs between two pieces of JSON data, as "where was this, is that"."""
    found: list[str] = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        path = f"{where}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{path}.")
        elif old != new:
            found.append(f"{path} was {_short(old)}, is {_short(new)}")
    return tuple(found)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file; {} where it is not there or not one: then nothing can be resumed from it."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        data = json.loads(path.read_bytes())
        if isinstance(data, dict):
            return data
    return {}


def clear_leftovers(store: Path, name: str, variant: str, keep: Collection[Path] = ()) -> None:
    """Remove what a stopped build of a variant left in staging. Only call under the variant's lock."""
    for leftover in leftovers(store, name, variant):
        if leftover not in keep:
            shutil.rmtree(leftover, ignore_errors=True)
    remove_if_empty(store / STAGING)


def leftovers(store: Path, name: str, variant: str) -> list[Path]:
    """Folders in staging that belong to a variant."""
    root, wanted = store / STAGING, f"{name}--{variant}"
    return [item for item in root.glob(f"{wanted}.*") if staged_variant(item.name) == wanted]


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, while other builds may be removing them because they are empty."""
    for _ in range(MKDIR_TRIES):
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            folder.mkdir(parents=True)
        if folder.is_dir():
            return
    folder.mkdir(parents=True)


def remove_if_empty(*folders: Path) -> None:
    """Remove those of the folders that are empty, in order."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
