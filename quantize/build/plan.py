"""Recipe x source -> Plan: what would be built, how large it is, what is there already, what can't work.

In: a recipe, a store, a cache. Out: a Plan with one VariantJob a variant. Reads headers, writes nothing into the store;
doing the work is left to build.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantize.build.disk import Needs, Room, needs, refusal, rooms, temporary_root
from quantize.build.job import VariantJob
from quantize.calibration.budget import memory_short, pass_bytes
from quantize.calibration.datasets import find_dataset
from quantize.errors import PlanError, QuantizeError
from quantize.events import Reporter, status
from quantize.formats import builders, find_format
from quantize.formats.base import Builder, Context, RunLimits, SizePlan
from quantize.model.checkpoint import Checkpoint, open_checkpoint
from quantize.model.source import PinnedSource, dequantized_key, open_source, pin_source
from quantize.recipe.model import Recipe, Variant
from quantize.store.manifest import OWN, CalibrationEntry, tool_versions
from quantize.store.store import Store
from quantize.system.cache import Cache
from quantize.system.digest import canonical_hash
from quantize.system.process import run_step

BUILD_KEY_VERSION = 2


@dataclass(frozen=True)
class Plan:
    """All jobs of a recipe, the disk that they take, and where. config: config.json of the source.

    memory_bytes: the least that the calibration pass takes of this machine's, with its hidden states on disk; 0 where
    there is no pass, or it runs on another device.
    """

    recipe: Recipe
    source: PinnedSource
    jobs: tuple[VariantJob, ...]
    disk: Needs
    rooms: tuple[Room, ...]
    memory_bytes: int
    config: Mapping[str, Any]

    @property
    def todo(self) -> tuple[VariantJob, ...]:
        """Jobs that are neither built nor refused."""
        return tuple(job for job in self.jobs if job.is_open)

    def shortage(self, limits: RunLimits) -> PlanError | None:
        """Why there is not enough disk for it, or memory; None if there is."""
        budget = limits.memory_budget_bytes
        if budget is not None and self.memory_bytes > budget:
            return memory_short(self.memory_bytes, budget)
        return refusal(self.rooms)


def make_plan(
    recipe: Recipe, store: Store, cache: Cache, reporter: Reporter, limits: RunLimits | None = None, *,
    measured: bool = True,
) -> Plan:  # fmt: skip
    """Plan a recipe with exact sizes; measured: what is built is evaluated too.

    Raises CheckpointError, PlanError, MissingExtraError.
    """
    recipe = pin_calibration(recipe, reporter)
    source = pin_source(recipe, cache, reporter)
    jobs = identify_jobs(recipe, source, store)
    plan = size_plan(recipe, source, jobs, store, cache, reporter, limits or RunLimits(), measured=measured)
    refused = plan.shortage(limits or RunLimits()) if plan.todo else None
    if refused is None:
        return plan
    jobs = [replace(job, refusal=refused) if job in plan.todo else job for job in plan.jobs]
    return replace(plan, jobs=tuple(jobs))


def size_plan(
    recipe: Recipe, source: PinnedSource, jobs: Sequence[VariantJob], store: Store, cache: Cache, reporter: Reporter,
    limits: RunLimits, *, measured: bool,
) -> Plan:  # fmt: skip
    """The plan of jobs that are identified, whether there is room for it or not. Raises as make_plan does."""
    with tempfile.TemporaryDirectory(prefix="quantize-plan-", dir=temporary_root()) as scratch:
        checkpoint = _checkpoint_headers(source, cache, Path(scratch) / "checkpoint", reporter)
        sized = size_jobs(jobs, recipe, source, checkpoint, cache, Path(scratch), limits, reporter)
        dequantized = _dequantized_bytes(source, checkpoint, cache)
    disk = needs(sized, recipe, checkpoint, measured=measured, source_bytes=dequantized)
    names = [job.variant.name for job in sized]
    found = rooms(disk, store.root, cache.root, recipe.name, names)
    return Plan(recipe, source, tuple(sized), disk, found, _pass_memory(sized, checkpoint, limits), checkpoint.config)


def _pass_memory(jobs: Sequence[VariantJob], checkpoint: Checkpoint, limits: RunLimits) -> int:
    todo = [job for job in jobs if job.is_open]
    parts = [(job.builder, job.variant.options) for job in todo if job.builder.needs_calibration(job.variant.options)]
    if not parts or limits.device != "cpu":
        return 0
    return pass_bytes(checkpoint, parts, limits.threads)


def pin_calibration(recipe: Recipe, reporter: Reporter) -> Recipe:
    """The recipe with its calibration dataset at a commit, if a variant needs it. Raises as Dataset.pin does."""
    if recipe.calibration is None or not any(
        builders()[item.format].needs_calibration(item.options) for item in recipe.variants
    ):
        return recipe
    return replace(recipe, calibration=find_dataset(recipe.calibration, recipe.path.parent).pin(reporter))


def identify_jobs(recipe: Recipe, source: PinnedSource, store: Store) -> list[VariantJob]:
    """Build keys, and what the store has already; reads no weights and starts no process.

    A job without a key has a refusal: it needs calibration, and the recipe has none.
    """
    jobs = []
    for variant in recipe.variants:
        builder = builders()[variant.format]
        tools = tool_versions(builder.tools(variant.options))
        try:
            inputs = _inputs(recipe, source, variant, builder, tools)
        except PlanError as exc:
            jobs.append(VariantJob(variant, builder, {}, tools, refusal=exc))
            continue
        existing = store.find_build(recipe.name, variant.name, canonical_hash(inputs))
        jobs.append(VariantJob(variant, builder, inputs, tools, existing))
    return jobs


def _inputs(
    recipe: Recipe, source: PinnedSource, variant: Variant, builder: Builder[Any], tools: dict[str, str]
) -> dict[str, Any]:
    calibration: Any = None
    if builder.needs_calibration(variant.options):
        if recipe.calibration is None:
            raise PlanError(
                f"variant {variant.name} needs calibration, and the recipe has none",
                hint="add `calibration: {dataset: python-docs, samples: 32, sequence_length: 512}`",
            )
        calibration = find_dataset(recipe.calibration, recipe.path.parent).identify()
    return {
        "version": BUILD_KEY_VERSION,
        "name": source.name,
        "uri": source.uri,
        "license": source.license,
        "base_model": source.base_model,
        "source": source.digest,
        "variant": variant.normalized(),
        "calibration": calibration,
        "tools": {name: version for name, version in tools.items() if name != OWN},
        "revision": find_format(variant.format).revision,
    }


def _checkpoint_headers(source: PinnedSource, cache: Cache, scratch: Path, reporter: Reporter) -> Checkpoint:
    """The checkpoint, or for a GGUF source that was not dequantized yet a stand-in with the same headers."""
    if not source.is_gguf or cache.entry("checkpoints", dequantized_key(source)).is_dir():
        return open_source(source, cache, reporter)
    from quantize.model.from_gguf import skeleton_of_gguf

    status(reporter, "", f"reading the headers of {source.location.name}")
    scratch.mkdir()
    run_step("reading the GGUF source", reporter, skeleton_of_gguf, source.location, scratch)
    return open_checkpoint(scratch)


def _expected(recipe: Recipe) -> CalibrationEntry | None:
    """What the manifest will say of the calibration text, as far as the spec tells: enough to size what names it."""
    spec = recipe.calibration
    if spec is None:
        return None
    stated = find_dataset(spec, recipe.path.parent).stated()
    return CalibrationEntry(spec=stated, hash="", sequences=spec.samples, tokens=0, seed=spec.seed)


def size_jobs(
    jobs: Sequence[VariantJob], recipe: Recipe, source: PinnedSource, checkpoint: Checkpoint, cache: Cache, scratch:
    Path, limits: RunLimits, reporter: Reporter,
) -> list[VariantJob]:  # fmt: skip
    """Fill in sizes, one call for each format; a variant that can't be sized gets its refusal instead."""
    result = {job.variant.name: job for job in jobs}
    for format_name in dict.fromkeys(job.variant.format for job in jobs):
        group = [job for job in jobs if job.variant.format == format_name]
        context = Context("", None, source, checkpoint, cache, scratch, scratch, limits, _expected(recipe))
        status(reporter, "", f"sizing {len(group)} {format_name} variants")
        for job, outcome in _size_group(group, context, reporter):
            filled = replace(job, refusal=outcome) if isinstance(outcome, QuantizeError) else replace(job, size=outcome)
            result[job.variant.name] = filled
    return [result[job.variant.name] for job in jobs]


def _size_group(
    group: Sequence[VariantJob], context: Context, reporter: Reporter
) -> list[tuple[VariantJob, SizePlan | QuantizeError]]:
    builder = group[0].builder
    checked = [(job, job.refusal or _refusal(job, context.checkpoint)) for job in group]
    refused = [(job, error) for job, error in checked if error is not None]
    good = [job for job, error in checked if error is None]
    try:
        sizes = builder.sizes(context, [job.variant.options for job in good], reporter) if good else []
    except QuantizeError as exc:
        sizes = [exc] * len(good)
    return [*refused, *zip(good, sizes, strict=True)]


def _refusal(job: VariantJob, checkpoint: Checkpoint) -> QuantizeError | None:
    try:
        job.builder.check(checkpoint, job.variant.options)
    except QuantizeError as exc:
        return exc
    return None


def _dequantized_bytes(source: PinnedSource, checkpoint: Checkpoint, cache: Cache) -> int:
    if not source.is_gguf or cache.entry("checkpoints", dequantized_key(source)).is_dir():
        return 0
    return sum(path.stat().st_size for path in checkpoint.folder.iterdir())  # weights as sparse files, the rest whole
