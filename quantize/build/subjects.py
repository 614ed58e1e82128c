"""What `estimate` can be asked about -> the models behind it, from headers alone.

In: a recipe, a checkpoint folder, a GGUF file, or an artifact. Out: Subjects: name, format, shape, bytes of weights.
Arithmetic is left to estimate/.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantize.build.plan import make_plan
from quantize.errors import UsageError
from quantize.estimate.vram import VramProfile
from quantize.events import Reporter
from quantize.formats import find_format, format_of, option_models
from quantize.formats.base import RunLimits
from quantize.formats.format import Format
from quantize.formats.safetensors.format import UNQUANTIZED
from quantize.model.checkpoint import open_checkpoint
from quantize.model.shape import ModelShape
from quantize.recipe.model import load_recipe
from quantize.store.artifact import Artifact
from quantize.store.manifest import FILE_NAME
from quantize.store.store import Store
from quantize.system.cache import Cache
from quantize.system.lookup import SUFFIXES


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


def subjects(target: str, store: Store, cache: Cache, reporter: Reporter) -> list[EstimateSubject]:
    """What TARGET means: every variant of a recipe, or the one model that it is.

    Raises UsageError: nothing of that name. CheckpointError, PlanError: it can't be read, or not be planned.
    """
    path = Path(target)
    if path.suffix in SUFFIXES:
        return _of_recipe(path, store, cache, reporter)
    if path.is_file() and (found := format_of(path)) is not None:
        return [_of_path(path.stem, found, path)]
    if path.is_dir() and not (path / FILE_NAME).is_file():
        checkpoint = open_checkpoint(path)
        shape = ModelShape.from_config(checkpoint.config)
        return [EstimateSubject(path.resolve().name, UNQUANTIZED, shape, checkpoint.weights_bytes)]
    try:
        return [_of_artifact(store.find(target))]
    except UsageError as exc:
        hint = f"{exc.hint}; a recipe, a checkpoint folder or a .gguf file will do as well"
        raise UsageError(exc.message, hint=hint) from exc


def siblings(subject: EstimateSubject, store: Store) -> list[EstimateSubject]:
    """The other current artifacts of the same recipe."""
    found = [item for item in store.artifacts() if store.is_current(item) and item.manifest.name == subject.family]
    return [_of_artifact(item) for item in found if f"{item.manifest.name}/{item.manifest.variant}" != subject.name]


def _of_recipe(path: Path, store: Store, cache: Cache, reporter: Reporter) -> list[EstimateSubject]:
    recipe = load_recipe(path, option_models())
    plan = make_plan(recipe, store, cache, reporter, RunLimits())
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
