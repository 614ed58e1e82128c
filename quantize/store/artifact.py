"""A build's folder from staging to its place in the store: filled out of sight, synced, then one rename.

In: a store root and a variant. Out: a complete artifact folder, or nothing. Names on disk are decided here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from quantize.store.manifest import (
    EVALUATION_NAME,
    FILE_NAME,
    MEASUREMENTS_NAME,
    PAPERS,
    FileEntry,
    Manifest,
    read_manifest,
)
from quantize.store.staging import (
    SCRATCH,
    STAGING,
    clear_leftovers,
    leftovers,
    lock_path,
    make_folder,
    remove_if_empty,
    store_errors,
    variant_lock,
)
from quantize.system.cache import hash_file
from quantize.system.files import sync, write_text
from quantize.system.flock import file_lock
from quantize.system.untrusted import parse_json, read_limited

CURRENT = "current"
REFUSED = "refused"  # folder beside a variant's good builds: those that its gates refused
UNJUDGED = ".unjudged"  # the same for builds that are complete and verified, and have no figures yet
ASIDE = (UNJUDGED, REFUSED)
PULLED = ".pulled"  # folder beside a variant's builds: a file for each that was not built here, with its reference
MAX_MEASUREMENTS_BYTES = 64 << 20


@dataclass(frozen=True)
class Artifact:
    """A finished artifact on disk."""

    folder: Path
    manifest: Manifest

    @property
    def ref(self) -> str:
        """name/variant@digest12: names it wherever the store is."""
        return f"{self.manifest.name}/{self.manifest.variant}@{self.manifest.short_digest}"

    @property
    def is_pulled(self) -> bool:
        """Whether it came from elsewhere."""
        return _pulled_mark(self.folder).is_file()

    @property
    def built_at(self) -> datetime | None:
        """When it was built; None where nobody says."""
        return when_built(self.measurements())

    def measurements(self) -> dict[str, Any]:
        """What was measured when and where; {} if nothing was."""
        return read_measurements(self.folder)


def read_measurements(folder: Path) -> dict[str, Any]:
    """What measurements.json of a folder holds; {} where it is not there or not readable."""
    with contextlib.suppress(OSError, ValueError):
        data = parse_json(read_limited(folder / MEASUREMENTS_NAME, MAX_MEASUREMENTS_BYTES))
        if isinstance(data, dict):
            return data
    return {}


def when_built(measurements: Mapping[str, Any]) -> datetime | None:
    """The time that measurements.json has of the build; None where there is none that can be read."""
    with contextlib.suppress(ValueError, TypeError):
        found = datetime.fromisoformat(measurements.get("built_at"))  # type: ignore[arg-type]
        return found if found.tzinfo is not None else None
    return None


def open_artifact(folder: Path) -> Artifact:
    """Read an artifact's manifest. Raises VerifyError."""
    return Artifact(folder, read_manifest(folder / FILE_NAME))


def variant_folder(store: Path, name: str, variant: str) -> Path:
    """Where the builds of a variant are."""
    return store / name / variant


def settle(store: Path, artifact: Artifact) -> None:
    """Make good what a build that was killed just after its commit left: its scratch folder, its lock, `current`.

    Does nothing where there is nothing to do, where a running build holds the variant, or where the store is read-only.
    """
    from filelock import Timeout

    name, variant = artifact.manifest.name, artifact.manifest.variant
    path, link = lock_path(store, name, variant), artifact.folder.parent / CURRENT
    current = link.is_symlink() and os.readlink(link) == artifact.folder.name
    if current and not path.exists() and not leftovers(store, name, variant):
        return
    lock = file_lock(path)
    try:
        make_folder(path.parent)
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
        remove_if_empty(path.parent, store / STAGING)


def describe_files(folder: Path, names: tuple[str, ...]) -> tuple[FileEntry, ...]:
    """Size and hash of each named file, sorted by path."""
    return tuple(
        FileEntry(path=name, size_bytes=(folder / name).stat().st_size, sha256=hash_file(folder / name))
        for name in sorted(names)
    )


def keep_only(folder: Path, manifest: Manifest) -> None:
    """Remove from a staging folder what is no part of the artifact: a stopped build may have left it."""
    wanted = {entry.path for entry in manifest.files} | set(PAPERS)
    for path in [item for item in folder.iterdir() if item.name not in wanted]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def write_measurements(folder: Path, measurements: Mapping[str, Any]) -> None:
    """Write measurements.json, whole or not at all."""
    text = json.dumps(measurements, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_text(folder / MEASUREMENTS_NAME, text)


def is_inside(store: Path, artifact: Artifact) -> bool:
    """Whether an artifact is one of the store's, not a folder elsewhere."""
    return artifact.folder.absolute().is_relative_to(store.absolute())


def artifact_lock(store: Path, artifact: Artifact) -> contextlib.AbstractContextManager[None]:
    """The lock of an artifact's variant, if it is in the store: something else may be writing beside it."""
    manifest = artifact.manifest
    return (
        variant_lock(store, manifest.name, manifest.variant) if is_inside(store, artifact) else contextlib.nullcontext()
    )


def update_measurements(store: Path, artifact: Artifact, changes: Mapping[str, Any]) -> None:
    """Put some keys into an artifact's measurements.json, the others stay. Raises StoreError."""
    with artifact_lock(store, artifact), store_errors(store):
        write_measurements(artifact.folder, {**artifact.measurements(), **changes})


def commit(store: Path, folder: Path, manifest: Manifest, pulled_from: str | None = None) -> Artifact:
    """Put a complete folder, staged or set aside, in its place and point `current` at it.

    If the same digest is there already and intact, its weights stay; only what was measured anew goes with it.
    pulled_from: the reference that it came from; one that was pulled before stays so. Raises StoreError.
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
        if folder != final:
            _move_mark(folder, final, pulled_from)
        point_current(final)
        sync(final.parent)
        remove_if_empty(folder.parent, final.parent)
    return Artifact(final, manifest)


def _move_mark(folder: Path, final: Path, pulled_from: str | None = None) -> None:
    """What was pulled is still so when it gets another place, or another digest by an accepted risk."""
    mark = _pulled_mark(folder)
    earlier = mark.read_text(encoding="utf-8").strip() if mark.is_file() else None
    mark_pulled(folder, None)
    mark_pulled(final, pulled_from or earlier)


def mark_pulled(folder: Path, reference: str | None) -> None:
    """Note that an artifact of the store came from `reference`; None: that it was built here.

    Beside its folder and not in it, where a signature covers every file.
    """
    mark = _pulled_mark(folder)
    if reference is not None:
        mark.parent.mkdir(exist_ok=True)
        write_text(mark, f"{reference}\n")
    else:
        mark.unlink(missing_ok=True)
        remove_if_empty(mark.parent)


def _pulled_mark(folder: Path) -> Path:
    return folder.parent / PULLED / folder.name


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
            _move_mark(folder, final)
        if place == REFUSED and good.exists():
            shutil.rmtree(good)
        sync(final.parent)
        remove_if_empty(folder.parent)
    return Artifact(final, manifest)


def _replace(store: Path, final: Path, folder: Path, manifest: Manifest) -> None:
    """Rename a folder to its final name; what has that name goes, after it."""
    damaged = store / STAGING / f"{manifest.name}--{manifest.variant}.{uuid.uuid4().hex[:8]}{SCRATCH}"
    if final.exists():
        make_folder(damaged.parent)
        final.rename(damaged)
    folder.rename(final)
    shutil.rmtree(damaged, ignore_errors=True)
    remove_if_empty(damaged.parent)


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
        sync(path)
    sync(folder)
