"""The store: which artifacts there are, which one a reference means, and what may be removed.

In: a root folder. Out: Artifacts. Making them is left to build; nothing here reads weights.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from quantize.errors import NewerSchemaError, RecipeError, UsageError, VerifyError
from quantize.recipe.yaml import read_document
from quantize.store.artifact import (
    ASIDE,
    CURRENT,
    REFUSED,
    UNJUDGED,
    Artifact,
    mark_pulled,
    open_artifact,
)
from quantize.store.staging import LOCKS, STAGING, staged_variant, store_errors, variant_lock
from quantize.system import digest
from quantize.system.flock import file_lock

PINS_NAME = "artifacts.lock"


def default_store_root() -> Path:
    """$QUANTIZE_STORE, else artifacts/ in the working folder."""
    return Path(os.environ.get("QUANTIZE_STORE") or "artifacts")


@dataclass(frozen=True)
class Broken:
    """A folder in the store that is no artifact that can be read, and why. newer: made by a later program."""

    folder: Path
    reason: str
    newer: bool = False


class Store:
    """Artifacts under one root: <recipe>/<variant>/<digest12>/. root: by default $QUANTIZE_STORE, else artifacts/."""

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = default_store_root() if root is None else Path(root)

    def folders(self) -> Iterator[Path]:
        """Every folder that an artifact can be in, sorted."""
        if not self.root.is_dir():
            return
        for recipe in sorted(item for item in self.root.iterdir() if item.is_dir() and not item.name.startswith(".")):
            for variant in sorted(item for item in recipe.iterdir() if item.is_dir()):
                for folder in sorted(variant.iterdir()):
                    if digest.is_short(folder.name) and folder.is_dir() and not folder.is_symlink():
                        yield folder

    def artifacts(self) -> list[Artifact]:
        """Every artifact with a good manifest, by name, variant and digest."""
        return [item for item in map(_open, self.folders()) if isinstance(item, Artifact)]

    def current_artifacts(self, recipe: str | None = None) -> list[Artifact]:
        """Those that `current` of their variant points at; recipe: only those of the recipe of that name."""
        return [item for item in self.artifacts() if recipe in (None, item.manifest.name) and self.is_current(item)]

    def broken(self) -> list[Broken]:
        """Folders whose manifest is missing, altered, or newer than this program."""
        return [item for item in map(_open, self.folders()) if isinstance(item, Broken)]

    def is_current(self, artifact: Artifact) -> bool:
        """Whether `current` of its variant points at it."""
        link = artifact.folder.parent / CURRENT
        return link.is_symlink() and Path(os.readlink(link)).name == artifact.folder.name

    def current(self, name: str, variant: str) -> Artifact | None:
        """The build that `current` of a variant points at; None for none that can be read."""
        link = self.root / name / variant / CURRENT
        found = _open(link.parent / Path(os.readlink(link)).name) if link.is_symlink() else None
        return found if isinstance(found, Artifact) else None

    def newer_than_pulled(self) -> list[Artifact]:
        """Builds of this store that a pulled one has replaced, though they are newer."""
        known = self.artifacts()
        pulled = {item.folder.parent: item for item in known if item.is_pulled and self.is_current(item)}
        found = []
        for item in known:
            current = pulled.get(item.folder.parent)
            if current is None or item.is_pulled:
                continue
            if current.built_at is None or item.built_at is None or item.built_at > current.built_at:
                found.append(item)
        return found

    def find(self, ref: str) -> Artifact:
        """The artifact that a reference means: name/variant, name/variant@digest, or the start of a digest.

        Raises UsageError: none, or more than one. NewerSchemaError: there is one that this program can't read.
        """
        found = self.matches(ref)
        if len(found) == 1:
            return found[0]
        if found:
            raise UsageError(f"{ref!r} means {len(found)} artifacts", hint="give more of the digest")
        self.refuse_newer(ref)
        raise UsageError(f"no artifact {ref!r}", hint=self.contents())

    def matches(self, ref: str) -> list[Artifact]:
        """Every artifact that a reference may mean."""
        name, _, start = ref.partition("@")
        if "/" in name:
            return self._by_name(name.strip("/"), start)
        text = start or name
        known = self.artifacts() if digest.is_start(text) else []
        return [item for item in known if digest.starts(item.manifest.digest, text)]

    def contents(self) -> str:
        """What there is, by name, as the hint of an error has it."""
        names = sorted({f"{item.manifest.name}/{item.manifest.variant}" for item in self.artifacts()})
        return f"there are: {', '.join(names[:12])}" if names else f"the store {self.root} is empty"

    def find_build(self, name: str, variant: str, build_key: str) -> Artifact | None:
        """The first of `find_builds`, if there is any."""
        return next(self.find_builds(name, variant, build_key), None)

    def find_builds(self, name: str, variant: str, build_key: str) -> Iterator[Artifact]:
        """The artifacts of this variant with this build key whose files are all there with their sizes.

        The current one first, if it is such; there may be others, with an accepted risk, a manifest of an older schema,
        or made otherwise by an earlier version.
        """
        folder = self.root / name / variant
        names = sorted(folder.iterdir()) if folder.is_dir() else []
        rest = (_open(item) for item in names if digest.is_short(item.name))
        for item in chain([self.current(name, variant)], rest):
            if isinstance(item, Artifact) and item.manifest.build_key == build_key and _complete(item):
                yield item

    def find_aside(self, name: str, variant: str, build_key: str) -> list[Artifact]:
        """Complete builds with this key that have no figures yet, and those that their gates refused."""
        found = []
        for place in ASIDE:
            folder = self.root / name / variant / place
            for candidate in sorted(folder.iterdir()) if folder.is_dir() else []:
                with contextlib.suppress(VerifyError):
                    item = open_artifact(candidate)
                    if item.manifest.build_key == build_key and _complete(item):
                        found.append(item)
        return found

    def refused(self) -> list[Artifact]:
        """Every build that its gates refused, by name, variant and digest."""
        found = []
        for folder in sorted(self.root.glob(f"*/*/{REFUSED}/*")):
            with contextlib.suppress(VerifyError):
                found.append(open_artifact(folder))
        return found

    def removable(self, *, newer: bool = False) -> list[tuple[Path, str]]:
        """What gc would remove: (folder, why). Never what is current, pinned in artifacts.lock, or of a schema that a
        later program wrote.

        newer: also what newer_than_pulled has.
        """
        pinned = self.pinned()
        kept = [] if newer else [item.folder for item in self.newer_than_pulled()]
        found = [
            (item.folder, "superseded")
            for item in self.artifacts()
            if not self.is_current(item)
            and item.folder not in kept
            and not any(item.manifest.digest.startswith(pin) for pin in pinned)
        ]
        found += [(item.folder, item.reason) for item in self.broken() if not item.newer]
        found += [
            (item.folder, "refused by its gates")
            for item in self.refused()
            if not any(item.manifest.digest.startswith(pin) for pin in pinned)
        ]
        found += [
            (folder, "left by a killed build")
            for folder in sorted(self.root.glob(f"*/*/{UNJUDGED}/*"))
            if not self._is_held(f"{folder.parents[2].name}--{folder.parents[1].name}.")
        ]
        return found

    def pinned(self) -> list[str]:
        """Digests that artifacts.lock names, in the working folder or beside the store."""
        digests: list[str] = []
        for path in {Path.cwd() / PINS_NAME, self.root.absolute().parent / PINS_NAME}:
            if not os.path.lexists(path):
                continue
            try:
                data = read_document(path).data
                digests += [_pin(item["digest"]) for item in data["artifacts"]]
            except (RecipeError, KeyError, TypeError, ValueError) as exc:
                hint = "it must be a list `artifacts:` of items with a `digest` of at least 12 hex digits, in quotes"
                raise UsageError(f"{path}: can't be read, so nothing is removed", hint=hint) from exc
        return digests

    def remove(self, folder: Path) -> None:
        """Remove one artifact's folder, under its variant's lock. Raises StoreError."""
        variant = folder.parents[1] if folder.parent.name in ASIDE else folder.parent
        with variant_lock(self.root, variant.parent.name, variant.name), store_errors(self.root):
            if (variant / CURRENT).is_symlink() and os.readlink(variant / CURRENT) == folder.name:
                return  # it became the current one while we waited
            with contextlib.suppress(FileNotFoundError):  # a build has moved it while we waited
                shutil.rmtree(folder)
            mark_pulled(folder, None)
            if folder.parent != variant:
                with contextlib.suppress(OSError):
                    folder.parent.rmdir()

    def leftovers(self) -> list[Path]:
        """Staging folders that no running build holds."""
        root = self.root / STAGING
        return sorted(item for item in root.iterdir() if not self._is_held(item.name)) if root.is_dir() else []

    def _is_held(self, staging_name: str) -> bool:
        from filelock import Timeout

        path = self.root / LOCKS / f"{staged_variant(staging_name)}.lock"
        if not path.exists():
            return False
        lock = file_lock(path)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):  # also where a store is read-only: nothing could be removed
            return True
        lock.release()
        return False

    def refuse_newer(self, ref: str) -> None:
        """Say of what was not found that it is there, where that is so. Raises NewerSchemaError."""
        name, _, start = ref.partition("@")
        name = name.strip("/")
        text = start if "/" in name else start or name
        for item in self.broken():
            variant = f"{item.folder.parents[1].name}/{item.folder.parent.name}"
            meant = variant == name if "/" in name else digest.is_start(text)
            if item.newer and meant and item.folder.name.startswith(digest.digits(text)[: digest.SHORT_DIGITS]):
                raise NewerSchemaError(item.reason)

    def _by_name(self, name: str, start: str) -> list[Artifact]:
        same = [item for item in self.artifacts() if f"{item.manifest.name}/{item.manifest.variant}" == name]
        if start:
            return [item for item in same if digest.starts(item.manifest.digest, start)]
        return [item for item in same if self.is_current(item)]


def _pin(value: object) -> str:
    text = digest.from_digits(digest.digits(value)) if isinstance(value, str) else ""
    if not digest.is_pin(text):  # digits alone are a number, whose leading zeros YAML takes for octal
        raise ValueError(value)
    return text


def _open(folder: Path) -> Artifact | Broken:
    try:
        artifact = open_artifact(folder)
    except VerifyError as exc:
        return Broken(folder, exc.message, newer=isinstance(exc, NewerSchemaError))
    if artifact.manifest.short_digest != folder.name:
        return Broken(folder, "the folder's name is not its manifest's digest")
    return artifact


def _complete(artifact: Artifact) -> bool:
    for entry in artifact.manifest.files:
        path = artifact.folder / entry.path
        if not os.path.isfile(path) or path.stat().st_size != entry.size_bytes:
            return False
    return True
