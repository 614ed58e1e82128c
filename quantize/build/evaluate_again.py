"""Measures an artifact that is built already, by the recipe that it carries or by another of the same model.

In: an artifact, a recipe, changes to its `evaluation`. Out: where the artifact is now, and the record. Measured as
its recipe says, the figures are recorded and the gates held; measured otherwise, nothing on disk changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantize.build.find_source import own_recipe, repin_source
from quantize.build.judge import Judge
from quantize.build.settle import GateKeeper, Settled, refusal
from quantize.errors import UsageError
from quantize.formats import option_models
from quantize.formats.base import RunLimits
from quantize.model.source import open_source
from quantize.recipe.model import Recipe, load_recipe
from quantize.store.artifact import Artifact, artifact_lock, is_inside
from quantize.store.store import Store
from quantize.store.verify import check_files
from quantize.store.workspace import Workspace
from quantize.targets import ArtifactTarget, RecipeTarget


@dataclass(frozen=True)
class EvaluationTarget:
    """An artifact to measure, and the recipe whose text, prompts and gates count."""

    artifact: Artifact
    recipe: Recipe


def to_evaluate(target: RecipeTarget | ArtifactTarget, store: Store) -> list[EvaluationTarget]:
    """An artifact by the recipe that it carries, or the current ones of a recipe by it. Raises as built_of does."""
    if isinstance(target, ArtifactTarget):
        return [EvaluationTarget(target.artifact, own_recipe(target.artifact))]
    recipe = load_recipe(target.path, option_models())
    return [EvaluationTarget(item, recipe) for item in _current(recipe, store)]


def built_of(target: RecipeTarget | ArtifactTarget, store: Store) -> list[Artifact]:
    """An artifact, or the current ones of a recipe. Raises UsageError: there is none. RecipeError."""
    if isinstance(target, ArtifactTarget):
        return [target.artifact]
    return _current(load_recipe(target.path, option_models()), store)


def _current(recipe: Recipe, store: Store) -> list[Artifact]:
    wanted = {variant.name for variant in recipe.variants}
    found = [item for item in store.current_artifacts(recipe.name) if item.manifest.variant in wanted]
    if not found:
        path = recipe.path
        raise UsageError(f"nothing of {path} is in {store.root}", hint=f"build it first: quantize build {path}")
    return found


def reevaluate(target: EvaluationTarget, workspace: Workspace, run: RunLimits, changes: Mapping[str, Any]) -> Settled:
    """Measure anew. changes: fields of the recipe's `evaluation` that are to be others; with any, nothing is written.

    Raises UsageError: no runtime is known for the format; wrong text or prompts. VerifyError: the files are not those
    of the manifest, or the source is not the one that they were made from.
    """
    store, cache, reporter = workspace.store, workspace.cache, workspace.reporter
    artifact, recipe = target.artifact, target.recipe
    manifest = artifact.manifest
    if not Judge.can_measure(manifest.format):
        raise UsageError(f"no runtime is known to evaluate the format {manifest.format} in")
    if changes:
        recipe = replace(recipe, evaluation=recipe.evaluation.model_copy(update=dict(changes)))
    check_files(artifact, reporter)
    source = repin_source(artifact, cache, reporter, recipe)
    checkpoint = open_source(source, cache, reporter)
    judge = Judge(recipe, source, cache, run)
    if changes:
        judged = judge.measure(artifact, checkpoint, reporter)
        error = None if judged.decision.accepted else refusal(artifact, judged.decision)
        return Settled(artifact, judged, error)
    gates = GateKeeper(judge, workspace, evaluate=True)
    if not is_inside(store.root, artifact):
        return gates.record(artifact, checkpoint)
    with artifact_lock(store.root, artifact):
        return gates.settle(artifact, checkpoint, anew=True)
