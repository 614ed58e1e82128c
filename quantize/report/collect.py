"""What the store knows about the artifacts of a recipe: manifests, and whatever was measured.

In: a store and a name. Out: PageSubject with its Entries. What was not measured, or can't be read, is None: a page
says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from quantize.bench.result import BenchResult
from quantize.errors import RecipeError, UsageError
from quantize.estimate.vram import MemoryTable
from quantize.evaluate.record import EvaluationRecord, GoldenRecord, Quality, read_record
from quantize.formats.memory import memory_of
from quantize.recipe.gates import GateLimits
from quantize.recipe.serving import ServingContext
from quantize.recipe.yaml import read_document
from quantize.store.artifact import Artifact
from quantize.store.manifest import RECIPE_NAME, SourceEntry
from quantize.store.store import Store
from quantize.targets import find_artifact

Section = TypeVar("Section", bound=BaseModel)

BLOCK_TENSOR = re.compile(r"(?:^|\.)(\d{1,5})\.(.+)$")


@dataclass(frozen=True)
class Layer:
    """Rounding loss of one matrix: the share of its output's energy on calibration text; nearest: rounded alone."""

    block: int
    name: str
    loss: float
    nearest: float | None


@dataclass(frozen=True)
class MeasuredArtifact:
    """One artifact and what was measured of it.

    called: what other commands find it by. refused: a gate refused it, and it is kept aside. memory: as estimated now.
    """

    artifact: Artifact
    called: str
    refused: bool
    evaluation: EvaluationRecord | None
    bench: BenchResult | None
    layers: tuple[Layer, ...]
    measurements: Mapping[str, Any]
    memory: MemoryTable | None = None

    @property
    def variant(self) -> str:
        """Its name in the recipe."""
        return self.artifact.manifest.variant

    @property
    def quality(self) -> Quality | None:
        """Figures against the source; None if there are none."""
        return None if self.evaluation is None else self.evaluation.quality

    @property
    def golden(self) -> GoldenRecord | None:
        """Golden prompts; None if none were asked."""
        return None if self.evaluation is None else self.evaluation.golden


@dataclass(frozen=True)
class PageSubject:
    """What a page is about: a recipe's artifacts, or one of them. gates, serving: the recipe's own, as in its file."""

    name: str
    entries: tuple[MeasuredArtifact, ...]
    gates: GateLimits
    description: str
    serving: ServingContext = field(default_factory=ServingContext)

    @property
    def source(self) -> SourceEntry:
        """The full-precision model."""
        return self.entries[0].artifact.manifest.source


def collect(store: Store, name: str | None) -> PageSubject:
    """Gather a recipe's current artifacts and the refused ones that are newer, or one artifact.

    None means the only recipe of the store.

    Raises UsageError: nothing of that name, or several recipes and none named.
    """
    current = store.current_artifacts()
    refused = store.refused()
    names = sorted({item.manifest.name for item in (*current, *refused)})
    if name is None:
        if not names:
            raise UsageError(f"no artifacts in {store.root}/", hint="build a recipe first: quantize build RECIPE")
        if len(names) > 1:
            raise UsageError(f"{store.root}/ has {len(names)} recipes", hint=f"name one: {', '.join(names)}")
        name = names[0]
    if name not in names:
        return _subject(name, [_entry(find_artifact(name, store), name, refused=False)])
    mine = {item.manifest.variant: item for item in current if item.manifest.name == name}
    aside: dict[str, Artifact] = {}
    for item in sorted((item for item in refused if item.manifest.name == name), key=_built):
        if item.manifest.variant not in mine or _built(item) > _built(mine[item.manifest.variant]):
            aside[item.manifest.variant] = item
    entries = [_entry(item, f"{name}/{item.manifest.variant}", refused=False) for item in mine.values()]
    entries += [_entry(item, item.ref, refused=True) for item in aside.values()]
    return _subject(name, sorted(entries, key=lambda entry: (entry.artifact.manifest.size_bytes, entry.variant)))


def _subject(name: str, entries: list[MeasuredArtifact]) -> PageSubject:
    newest = max(entries, key=lambda entry: str(entry.measurements.get("built_at", "")))
    recipe = _recipe(newest.artifact)
    description = recipe.get("description")
    return PageSubject(
        name,
        tuple(entries),
        _section(GateLimits, recipe.get("gates")),
        description if isinstance(description, str) else "",
        _section(ServingContext, recipe.get("serving")),
    )


def _entry(artifact: Artifact, called: str, *, refused: bool) -> MeasuredArtifact:
    measurements = artifact.measurements()
    return MeasuredArtifact(
        artifact,
        called,
        refused,
        read_record(measurements),
        _bench(measurements.get("bench")),
        tuple(_layers(measurements.get("layers"))),
        measurements,
        memory_of(artifact),
    )


def _bench(data: Any) -> BenchResult | None:
    try:
        return BenchResult.model_validate(data)
    except ValidationError:
        return None


def _layers(data: Any) -> Iterator[Layer]:
    """Losses that are shares; those that are not (of builds by an older version) are left out."""
    for tensor, facts in data.items() if isinstance(data, Mapping) else ():
        match = BLOCK_TENSOR.search(tensor)
        loss = facts.get("loss") if isinstance(facts, Mapping) else None
        if match is None or not isinstance(loss, int | float) or not 0 <= loss <= 1:
            continue
        nearest = facts.get("nearest_loss")
        usable = isinstance(nearest, int | float) and 0 <= nearest < 1e300
        yield Layer(int(match.group(1)), match.group(2), float(loss), float(nearest) if usable else None)


def _recipe(artifact: Artifact) -> Mapping[str, Any]:
    try:
        data = read_document(artifact.folder / RECIPE_NAME).data
    except RecipeError:
        return {}
    return data if isinstance(data, dict) else {}


def _section(model: type[Section], data: Any) -> Section:
    """A part of a recipe; its defaults where there is none, or it can't be read."""
    try:
        return model.model_validate(data)
    except ValidationError:
        return model()


def _built(item: Artifact) -> str:
    return str(item.measurements().get("built_at", ""))
