"""A finished artifact -> the source checkpoint that it was made from, found again and held against the manifest.

In: an artifact. Out: its source, pinned and opened, or an error if it is gone or is no longer the same. A source from
the hub or a package has its address in the manifest; a local one is looked for by its recipe's path, by its content
among the files that were hashed on this machine, and by its name. What is found counts by its hashes only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from quantize.errors import CheckpointError, RecipeError, StoreError, VerifyError, some_of
from quantize.events import Reporter, note
from quantize.files.gguf_split import first_shard
from quantize.formats import option_models
from quantize.model.checkpoint import Checkpoint
from quantize.model.source import (
    Beside,
    PinnedSource,
    SourceFile,
    fetch_companion,
    files_digest,
    open_source,
    pin_address,
    pin_path,
    pin_source,
)
from quantize.recipe.model import Recipe, load_recipe
from quantize.store.artifact import Artifact
from quantize.store.manifest import RECIPE_NAME, SourceEntry
from quantize.system.cache import Cache


def own_recipe(artifact: Artifact) -> Recipe:
    """The recipe that an artifact carries. Raises RecipeError."""
    return load_recipe(artifact.folder / RECIPE_NAME, option_models())


def reopen_source(artifact: Artifact, cache: Cache, reporter: Reporter, given: Path | None = None) -> Checkpoint:
    """The checkpoint of an artifact; given: where to take it from. Raises VerifyError, CheckpointError."""
    return open_source(find_source(artifact, cache, reporter, given=given), cache, reporter)


def repin_source(artifact: Artifact, cache: Cache, reporter: Reporter, recipe: Recipe) -> PinnedSource:
    """The source of a recipe, which must be the artifact's; by the artifact's own recipe it is looked for everywhere.

    Raises VerifyError if it is not the manifest's, CheckpointError if it is not there.
    """
    if recipe.path == artifact.folder / RECIPE_NAME:
        return find_source(artifact, cache, reporter)
    return _checked(artifact, pin_source(recipe, cache, reporter))


def find_source(
    artifact: Artifact, cache: Cache, reporter: Reporter, *, given: Path | None = None, known: Cache | None = None
) -> PinnedSource:
    """The source that an artifact's manifest states. known: the cache that has seen files of this machine, if another.

    Raises VerifyError: what was found, or given, is not what it was built from. CheckpointError: it is nowhere.
    """
    entry = artifact.manifest.source
    beside = Beside(*(_companion(artifact, known or cache, what, reporter) for what in ("tokenizer", "adapter")))
    if given is not None:
        return _checked(artifact, pin_path(given, cache, reporter, beside))
    found = pin_address(entry.uri, cache, reporter, beside)
    if found is None and (path := Path(_model(artifact)).expanduser()).is_absolute() and path.exists():
        found = pin_path(path, cache, reporter, beside)
    if found is not None:
        return _checked(artifact, found)
    refusal: VerifyError | None = None
    problem: CheckpointError | None = None
    for path in dict.fromkeys(Path(os.path.abspath(path)) for path in _places(artifact, known or cache)):
        try:
            source = _checked(artifact, pin_path(path, cache, reporter, beside))
            note(reporter, "", f"the source {entry.uri} is {path}")
            return source
        except VerifyError as exc:
            refusal = refusal or exc
        except CheckpointError as exc:
            problem = problem or exc
    if refusal is not None:
        raise refusal
    raise CheckpointError(
        f"{artifact.ref}: its source {entry.uri} is not found" + (f" ({problem.message})" if problem else ""),
        hint="run this where its recipe's path leads to it, or say where it is: --source PATH (verify, rebuild)",
    )


def _places(artifact: Artifact, known: Cache) -> Iterator[Path]:
    """Where a local source may be, likeliest first; only what is there."""
    entry = artifact.manifest.source
    bases = [artifact.folder.absolute(), *artifact.folder.absolute().parents, *Path.cwd().parents]
    names = [name for name in (_model(artifact), entry.uri.removeprefix("local:")) if name]
    yield from (path for path in (Path.cwd() / names[0], *_same_content(entry, known)) if path.exists())
    yield from (base / name for name in names for base in (Path.cwd(), *bases) if (base / name).exists())


def _companion(artifact: Artifact, known: Cache, what: str, reporter: Reporter) -> Path | None:
    """The folder of the tokenizer or the adapter that a manifest has files of; None where it has none.

    Looked for as the source is, by its content first. Raises CheckpointError: it is nowhere.
    """
    files = [item for item in artifact.manifest.source.files if item.path.startswith(f"{what}/")]
    if not files:
        return None
    largest = max(files, key=lambda item: item.size_bytes)
    name = largest.path.removeprefix(f"{what}/")
    with contextlib.suppress(StoreError):
        for path in known.paths_with(largest.sha256):
            if path.as_posix().endswith(f"/{name}"):
                return path.parents[len(Path(name).parts) - 1]
    written = _written(artifact, what)
    bases = [artifact.folder.absolute(), *artifact.folder.absolute().parents, Path.cwd(), *Path.cwd().parents]
    for base in bases if written else ():
        if (base / Path(written).expanduser()).is_dir():
            return base / Path(written).expanduser()
    return fetch_companion(written or what, what, reporter)


def _written(artifact: Artifact, what: str) -> str:
    """What the artifact's own recipe names as its tokenizer or adapter; "" where that can't be read."""
    try:
        return getattr(own_recipe(artifact).source, what) or ""
    except RecipeError:
        return ""


def _model(artifact: Artifact) -> str:
    """What the artifact's own recipe calls its source; "" where that can't be read, or is a file of a package."""
    try:
        model = own_recipe(artifact).source.model
    except RecipeError:
        return ""
    return model if isinstance(model, str) else ""


def _same_content(entry: SourceEntry, known: Cache) -> list[Path]:
    """Folders, or GGUF files, with the source's largest file as it was when it was last read."""
    if not entry.files:
        return []
    largest = max(entry.files, key=lambda item: item.size_bytes)
    try:
        paths = known.paths_with(largest.sha256)
    except StoreError:
        return []
    if largest.path.endswith(".gguf"):
        return [first_shard(path) for path in paths if path.suffix == ".gguf"]
    depth = len(Path(largest.path).parts)
    return [path.parents[depth - 1] for path in paths if path.as_posix().endswith(f"/{largest.path}")]


def _checked(artifact: Artifact, source: PinnedSource) -> PinnedSource:
    """The source as the manifest states it. Raises VerifyError for other files."""
    entry = artifact.manifest.source
    wanted = {item.path: item.sha256 for item in entry.files}
    found = {item.path: item.sha256 for item in source.files}
    if source.is_gguf and len(wanted) == len(found):  # what the files of a GGUF model are called does not matter
        found = dict(zip(sorted(wanted), (found[name] for name in sorted(found)), strict=True))
    if found != wanted:
        other = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise VerifyError(
            f"{artifact.ref}: the source {source.uri} is not the one that it was built from ({_named(other)})",
            hint="get that revision back, or build again",
        )
    return as_stated(source, entry)


def _named(files: list[str]) -> str:
    return f"{some_of(files, 3)} differ{'s' * (len(files) == 1)}"


def as_stated(pinned: PinnedSource, entry: SourceEntry) -> PinnedSource:
    """A source that has the files of a manifest, with the words that the manifest has for it."""
    files = tuple(SourceFile(item.path, item.size_bytes, item.sha256) for item in entry.files)
    return replace(
        pinned, uri=entry.uri, revision=entry.revision, name=entry.name, base_model=entry.base_model,
        license=entry.license, files=files, digest=files_digest(files),
    )  # fmt: skip
