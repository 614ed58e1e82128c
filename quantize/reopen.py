"""A finished artifact -> the source checkpoint that it was made from, found again through its own recipe.

In: an artifact. Out: its source, pinned and opened, or an error if it is gone or is no longer the same.
"""

from __future__ import annotations

from quantize.artifact import Artifact
from quantize.backends import formats
from quantize.cache import Cache
from quantize.checkpoint import Checkpoint
from quantize.errors import VerifyError
from quantize.manifest import RECIPE_NAME
from quantize.recipe import Recipe, load_recipe
from quantize.report import Reporter
from quantize.source import PinnedSource, open_source, pin_source


def own_recipe(artifact: Artifact) -> Recipe:
    """The recipe that an artifact carries. Raises RecipeError."""
    return load_recipe(artifact.folder / RECIPE_NAME, formats())


def repin_source(artifact: Artifact, cache: Cache, reporter: Reporter, recipe: Recipe | None = None) -> PinnedSource:
    """The source of an artifact, by its own recipe or another. Raises VerifyError if it is not the manifest's."""
    recipe = recipe or own_recipe(artifact)
    source = pin_source(recipe, cache, reporter)
    wanted = {entry.path: entry.sha256 for entry in artifact.manifest.source.files}
    if {file.path: file.sha256 for file in source.files} != wanted:
        raise VerifyError(
            f"{artifact.ref}: the source {source.uri} is not the one that it was built from",
            hint="get that revision back, or build again",
        )
    return source


def reopen_source(artifact: Artifact, cache: Cache, reporter: Reporter) -> Checkpoint:
    """The checkpoint of an artifact. Raises VerifyError, CheckpointError."""
    return open_source(repin_source(artifact, cache, reporter), cache, reporter)
