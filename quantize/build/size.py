"""Plan -> SizedPlan: how large each artifact will be, the disk and memory that a build takes, and whether it is there.

In: a plan, a store, a cache. Out: the plan with exact sizes, from headers alone; the refusal of a build that would fill
a disk or its memory. Writes nothing into the store.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quantize.build.disk import Needs, Room, disk_free_bytes, most_bytes, needs, refusal, rooms, temporary_root
from quantize.build.job import VariantJob
from quantize.build.plan import Plan
from quantize.calibration.budget import (
    BASE_BYTES,
    FLOAT_BYTES,
    GpuNeed,
    gpu_pass_bytes,
    host_bytes,
    memory_short,
    pass_bytes,
    state_bytes,
)
from quantize.calibration.mix import CalibrationText
from quantize.errors import DiskFullError, PlanError, QuantizeError, first_line, is_out_of_memory
from quantize.events import Reporter, SilentReporter, status
from quantize.formats.base import Builder, Context, RunLimits, SizePlan
from quantize.model.checkpoint import Checkpoint
from quantize.model.shape import ModelShape
from quantize.model.source import PinnedSource, is_made, open_headers
from quantize.model.towers import say_text_alone
from quantize.recipe.calibration import Calibration, CalibrationMix
from quantize.recipe.model import Recipe
from quantize.runtimes.sampling import CHATS
from quantize.store.manifest import CalibrationEntry, CalibrationPart
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.system.memory import free_gpu_bytes
from quantize.system.process import run_step

NO_GPU_WORK = "`quantize doctor` says more; or use --device cpu"


@dataclass(frozen=True, kw_only=True)
class SizedPlan(Plan):
    """A plan whose jobs have their sizes, the disk that they take, and where. config: config.json of the source.

    memory_bytes: the least that the calibration pass takes of this machine's, with its hidden states on disk or on a
    GPU; 0 where there is no pass. gpu: what it takes of one; None if it does not run there. text: what is calibrated
    on, as far as the spec tells; None where nothing is.
    """

    disk: Needs
    rooms: tuple[Room, ...]
    memory_bytes: int
    gpu: GpuNeed | None
    config: Mapping[str, Any]
    text: CalibrationEntry | None

    def shortage(self, limits: RunLimits) -> PlanError | None:
        """Why there is not enough disk for it, or memory; None if there is."""
        budget = limits.memory_budget_bytes
        if budget is not None and self.memory_bytes > budget:
            return memory_short(self.memory_bytes, budget)
        return (self.gpu.shortage() if self.gpu is not None else None) or refusal(self.rooms)

    @property
    def shown(self) -> tuple[CalibrationPart, ...]:
        """What is calibrated on, dataset by dataset: the most that each gives, and why one is left out."""
        if self.text is None:
            return ()
        if self.text.parts is not None:
            return self.text.parts
        most = CalibrationPart(
            dataset=self.text.names[0], sequences=self.text.sequences, tokens=self.text.tokens, hash="", left_out=None
        )
        return (most,)

    @property
    def is_guided(self) -> bool:
        """Whether the model goes forward and back before the pass, for what each token counts."""
        spec = self.recipe.calibration
        return self.text is not None and spec is not None and spec.guided

    def states_are(self, limits: RunLimits) -> str:
        """Where a pass on a GPU keeps its hidden states; empty if there is none."""
        budget = limits.memory_budget_bytes
        return self.gpu.states_are(None if budget is None else budget - self.memory_bytes) if self.gpu else ""

    def to_data(self) -> dict[str, Any]:
        """Plain JSON data, for people and programs."""
        return super().to_data() | {
            "disk_needed_bytes": self.disk.peak_bytes,
            "disk_free_bytes": min(room.free_bytes for room in self.rooms),
            "disk_parts": asdict(self.disk),
            "pass_memory_bytes": self.memory_bytes,
            "calibration": None if self.text is None else [part.model_dump(exclude={"hash"}) for part in self.shown],
            "guided": self.is_guided,
            "pass_gpu": None if self.gpu is None else asdict(self.gpu),
            "disks": [
                {
                    "what": room.what,
                    "needed_bytes": room.needed_bytes,
                    "free_bytes": room.free_bytes,
                    "missing_bytes": room.missing_bytes,
                }
                for room in self.rooms
            ],
        }


def size_plan(plan: Plan, workspace: Workspace, limits: RunLimits) -> SizedPlan:
    """The plan with exact sizes; what there is no room for is refused.

    Raises CheckpointError, PlanError, MissingExtraError.
    """
    sized = measure_plan(plan, workspace, limits)
    refused = sized.shortage(limits) if sized.todo else None
    if refused is None:
        return sized
    jobs = tuple(replace(job, refusal=refused) if job.is_open else job for job in sized.jobs)
    return replace(sized, jobs=jobs)


def measure_plan(plan: Plan, workspace: Workspace, limits: RunLimits) -> SizedPlan:
    """The plan with exact sizes, whether there is room for it or not. Raises as size_plan does."""
    source, cache, reporter = plan.source, workspace.cache, workspace.reporter
    with tempfile.TemporaryDirectory(prefix="quantize-plan-", dir=temporary_root()) as scratch:
        checkpoint = open_headers(source, cache, Path(scratch) / "checkpoint", reporter)
        say_text_alone(checkpoint, reporter)
        expected = _expected(plan.recipe, checkpoint)
        context = Context("", None, source, checkpoint, cache, Path(scratch), Path(scratch), limits,
                          expected)  # fmt: skip
        jobs = _size_jobs(plan.jobs, context, plan.recipe.calibration, reporter)
        dequantized = _dequantized_bytes(source, checkpoint, cache)
        parts = [(job.builder, job.variant.options) for job in jobs if job.is_open and job.is_calibrated]
        gpu = _gpu_need(parts, plan.recipe, checkpoint, limits, reporter)
    disk = needs(jobs, plan.recipe, checkpoint, measured=plan.evaluate, source_bytes=dequantized)
    found = rooms(disk, workspace.store.root, cache.root, plan.recipe.name, [job.name for job in jobs])
    return SizedPlan(
        plan.recipe, source, jobs, plan.force, plan.evaluate, disk=disk, rooms=found,
        memory_bytes=_pass_memory(parts, plan.recipe, checkpoint, limits), gpu=gpu, config=checkpoint.config,
        text=expected if any(job.is_calibrated for job in jobs) else None,
    )  # fmt: skip


def check_room(plan: Plan, workspace: Workspace, limits: RunLimits) -> None:
    """Refuse a build that would fill a disk or its memory, before it has written anything. Raises PlanError."""
    most = most_bytes(plan.jobs, plan.recipe, plan.source, measured=bool(plan.measured))
    roomy = all(disk_free_bytes(root) >= most for root in (workspace.store.root, workspace.cache.root))
    calibrates_on_gpu = limits.on_gpu and bool(plan.calibrated)
    if roomy and limits.memory_budget_bytes is None and not calibrates_on_gpu:
        return
    refused = measure_plan(plan, workspace, limits).shortage(limits)
    if refused is not None:
        raise refused


def say_what_is_missing(error: DiskFullError, plan: Plan, workspace: Workspace, limits: RunLimits) -> None:
    """Put into the hint how much more space the plan needs than there is."""
    try:
        found = measure_plan(plan, replace(workspace, reporter=SilentReporter()), limits).rooms
    except (QuantizeError, OSError):  # no room even for that
        return
    short = [room for room in found if room.missing_bytes]
    if short:
        missing = " and ".join(f"{room.missing_bytes:,} bytes are missing for the {room.what}" for room in short)
        error.hint = f"{missing}: free them and run the same build again, it goes on where it stopped"


def _expected(recipe: Recipe, checkpoint: Checkpoint) -> CalibrationEntry | None:
    """What the manifest will say of the calibration text, as far as the spec tells: enough to size what names it.

    Sequences and tokens are the most that there can be.
    """
    spec = recipe.calibration
    if spec is None:
        return None
    text = CalibrationText(spec, recipe.path.parent)
    parts = [
        CalibrationPart(dataset=name, sequences=0 if why else part.samples, tokens=0 if why else part.tokens, hash="",
                        left_out=why)
        for name, part, why in zip(text.names, spec.parts, text.left_out(checkpoint.parameters), strict=True)
    ]  # fmt: skip
    return CalibrationEntry(
        spec=text.stated(), hash="", sequences=sum(part.sequences for part in parts),
        tokens=sum(part.tokens for part in parts), seed=spec.seed,
        parts=tuple(parts) if isinstance(spec, CalibrationMix) else None,
    )  # fmt: skip


def _size_jobs(
    jobs: Sequence[VariantJob], context: Context, calibration: Calibration | None, reporter: Reporter
) -> tuple[VariantJob, ...]:
    """Fill in sizes, one call for each format; a variant that can't be sized gets its refusal instead."""
    result = {job.name: job for job in jobs}
    for format_name in dict.fromkeys(job.variant.format for job in jobs):
        group = [job for job in jobs if job.variant.format == format_name]
        status(reporter, "", f"sizing {len(group)} {format_name} variants")
        for job, outcome in _size_group(group, context, calibration, reporter):
            filled = replace(job, refusal=outcome) if isinstance(outcome, QuantizeError) else replace(job, size=outcome)
            result[job.name] = filled
    return tuple(result[job.name] for job in jobs)


def _pass_memory(
    parts: Sequence[tuple[Builder[Any], Any]], recipe: Recipe, checkpoint: Checkpoint, limits: RunLimits
) -> int:
    """Of the process that runs the pass: to make the text, where the model writes it, and then for the blocks."""
    if not parts:
        return 0
    guided = recipe.calibration is not None and recipe.calibration.guided
    blocks = host_bytes(checkpoint)
    if limits.device == "cpu":
        blocks = pass_bytes(checkpoint, parts, limits.threads, guided=guided)
    if recipe.calibration is None:
        return blocks
    text = CalibrationText(recipe.calibration, recipe.path.parent)
    return max(blocks, _writing_bytes(checkpoint, text.spec.sequence_length) if text.is_written_by(checkpoint) else 0)


def _writing_bytes(checkpoint: Checkpoint, length: int) -> int:
    """Of a model that writes its own text: its weights as stored and in float32, keys and values of the rows at hand.

    By it the demo model takes 1,620 MB for `starter`; the process was measured at 1,522 MB.
    """
    a_token = sum(layer.expanded_values for layer in ModelShape.from_config(checkpoint.config).kv_layers)
    weights = checkpoint.weights_bytes + FLOAT_BYTES * checkpoint.parameters
    return BASE_BYTES + weights + FLOAT_BYTES * a_token * CHATS * length


def _gpu_need(
    parts: Sequence[tuple[Builder[Any], Any]], recipe: Recipe, checkpoint: Checkpoint, limits: RunLimits,
    reporter: Reporter,
) -> GpuNeed | None:  # fmt: skip
    """What the pass takes of this machine's GPU; a process of its own asks it, which pays for the driver's part."""
    spec = recipe.calibration
    if not parts or spec is None or not limits.on_own_gpu:
        return None
    free = run_step("asking the GPU for its free memory", reporter, ask_gpu, limits.device)
    taken = gpu_pass_bytes(checkpoint, parts, guided=spec.guided)
    return GpuNeed(limits.device, taken, state_bytes(checkpoint.config, spec.tokens), free)


def ask_gpu(_reporter: Reporter, device: str) -> int:
    """Free bytes of a GPU that computes. Raises PlanError: its driver is too old for this torch, or torch has no code
    for it, which only shows when something runs there.
    """
    import torch

    try:
        free = free_gpu_bytes(device)
        computed = int(torch.ones(1, device=device).add_(1))
    except RuntimeError as exc:
        if is_out_of_memory(exc):
            raise
        raise PlanError(f"{device} can't compute: {first_line(exc)}", hint=NO_GPU_WORK) from exc
    if computed != 2:
        raise PlanError(f"{device} can't compute: 1 and 1 is {computed} there", hint=NO_GPU_WORK)
    return free


def _size_group(
    group: Sequence[VariantJob], context: Context, calibration: Calibration | None, reporter: Reporter
) -> list[tuple[VariantJob, SizePlan | QuantizeError]]:
    builder = group[0].builder
    checked = [(job, job.refusal or _refusal(job, context.checkpoint, calibration)) for job in group]
    refused = [(job, error) for job, error in checked if error is not None]
    good = [job for job, error in checked if error is None]
    try:
        sizes = builder.sizes(context, [job.variant.options for job in good], reporter) if good else []
    except QuantizeError as exc:
        sizes = [exc] * len(good)
    return [*refused, *zip(good, sizes, strict=True)]


def _refusal(job: VariantJob, checkpoint: Checkpoint, calibration: Calibration | None) -> QuantizeError | None:
    try:
        job.check(checkpoint, calibration)
    except QuantizeError as exc:
        return exc
    return None


def _dequantized_bytes(source: PinnedSource, checkpoint: Checkpoint, cache: Cache) -> int:
    if not source.is_derived or is_made(source, cache):
        return 0
    return sum(path.stat().st_size for path in checkpoint.folder.iterdir())  # weights as sparse files, the rest whole
