"""What `estimate` can be asked about -> the models behind it, from headers alone.

In: a recipe, a model's folder or file, or an artifact. Out: Subjects: name, format, shape, bytes of weights.
Arithmetic is left to estimate/.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantize.build.plan import make_plan
from quantize.build.size import size_plan
from quantize.estimate.vram import VramProfile
from quantize.formats import find_format, format_of, option_models
from quantize.formats.base import RunLimits
from quantize.formats.format import Format
from quantize.formats.safetensors.format import UNQUANTIZED
from quantize.model.checkpoint import open_checkpoint
from quantize.model.shape import ModelShape
from quantize.recipe.model import load_recipe
from quantize.store.artifact import Artifact
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.targets import ArtifactTarget, FileTarget, FolderTarget, RecipeTarget

Estimable = RecipeTarget | FolderTarget | FileTarget | ArtifactTarget
ESTIMABLE = (RecipeTarget, FolderTarget, FileTarget, ArtifactTarget)


@dataclass(frozen=True)
class EstimateSubject:
    """One model in one format. family: names those that are of the same model, and so could take its place."""

    name: str
    format: str
    shape: ModelShape
    weights_bytes: int
    family: str = ""

    @property
    def profile(self) -> VramProfile:
        """What its memory depends on beside shape and size."""
        return find_format(self.format).vram


def subjects(target: Estimable, workspace: Workspace) -> list[EstimateSubject]:
    """Every variant of a recipe, or the one model that a target is.

    Raises CheckpointError, PlanError: it can't be read, or not be planned.
    """
    match target:
        case RecipeTarget():
            return _of_recipe(target.path, workspace)
        case FileTarget():
            return [_of_path(target.path.stem, target.format, target.path)]
        case FolderTarget():
            kind = format_of(target.path)
            if kind is not None and kind.name != UNQUANTIZED:
                return [_of_path(target.path.resolve().name, kind, kind.model_path(target.path))]
            checkpoint = open_checkpoint(target.path)
            shape = ModelShape.from_config(checkpoint.config)
            return [EstimateSubject(target.path.resolve().name, UNQUANTIZED, shape, checkpoint.weights_bytes)]
        case ArtifactTarget():
            return [_of_artifact(target.artifact)]


def siblings(subject: EstimateSubject, store: Store) -> list[EstimateSubject]:
    """The other current artifacts of the same recipe."""
    found = store.current_artifacts(subject.family)
    return [_of_artifact(item) for item in found if f"{item.manifest.name}/{item.manifest.variant}" != subject.name]


def _of_recipe(path: Path, workspace: Workspace) -> list[EstimateSubject]:
    recipe = load_recipe(path, option_models())
    plan = size_plan(make_plan(recipe, workspace), workspace, RunLimits())
    found = [
        EstimateSubject(
            f"{recipe.name}/{job.variant.name}", job.variant.format, ModelShape.from_config(plan.config),
            job.size.weights_bytes, recipe.name,
        )
        for job in plan.jobs
        if job.size is not None
    ]  # fmt: skip
    refusals = [job.refusal for job in plan.jobs if job.refusal is not None and job.size is None]
    if refusals and not found:
        raise refusals[0]
    return found


def _of_artifact(artifact: Artifact) -> EstimateSubject:
    manifest = artifact.manifest
    kind = find_format(manifest.format)
    path = kind.model_path(artifact.folder)
    return _of_path(f"{manifest.name}/{manifest.variant}", kind, path, manifest.name)


def _of_path(name: str, kind: Format, path: Path, family: str = "") -> EstimateSubject:
    found = kind.layout.measure(path)
    return EstimateSubject(name, kind.name, found.shape, found.weights_bytes, family)
