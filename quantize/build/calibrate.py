"""One calibration pass that serves every calibrated variant of a recipe, whatever their formats.

In: the recipe's calibration spec and the variants' contexts. Out: what the manifest says of the text, each variant's
error if it failed, measurements. The pass runs in a worker process; builders see its blocks through their collectors.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.build.job import no_calibration
from quantize.build.pass_words import measured_on_gpu, say_how, say_what_text
from quantize.build.widen import widened_all
from quantize.calibration.budget import gpu_pass_bytes, host_bytes, pass_bytes
from quantize.calibration.journal import PassJournal
from quantize.calibration.spread import PassSpread
from quantize.errors import (
    BuildError,
    DiskFullError,
    OutOfMemory,
    QuantizeError,
    Stopped,
    disk_full,
    first_line,
    is_disk_full,
    is_out_of_memory,
)
from quantize.events import Reporter, note, status, warn
from quantize.formats.base import Builder, Collector, Context, RunLimits
from quantize.model.architecture import block_count, block_layouts
from quantize.recipe.calibration import Calibration
from quantize.recipe.model import Recipe
from quantize.store.manifest import CalibrationEntry, tool_versions
from quantize.system.memory import free_gpu_bytes, give_back_gpu
from quantize.system.process import peak_memory_bytes, run_step, stop_asked

if TYPE_CHECKING:
    from quantize.build.spread.run import SpreadPass
    from quantize.calibration.hidden_states import SavedStates
    from quantize.calibration.stream import Block, Precision, Spill
    from quantize.calibration.token_weights import TokenWeights
    from quantize.evaluate.job import Ride
    from quantize.evaluate.rider import Rider

SECONDS_BETWEEN_STATES = 60.0  # of a pass on a GPU, which runs a block again sooner than it writes its states


@dataclass(frozen=True)
class PassResult:
    """What a pass leaves. device: the kind that it ran on. errors: variant -> why it got nothing from the pass.

    wide: the source's activations come near the end of FP16's range, as far as a variant needed to know.
    """

    entry: CalibrationEntry
    device: str
    errors: dict[str, QuantizeError]
    measurements: dict[str, Any]
    wide: bool = False


@dataclass
class _Part:
    """One variant's part in the pass, until it fails. blocks: how many it has done, in this build or a stopped one."""

    context: Context
    builder: Builder[Any]
    collector: Collector
    blocks: int = 0
    seconds: float = 0.0
    error: QuantizeError | None = field(default=None)


@dataclass(frozen=True)
class _Material:
    """What is run. folder: of the pass. guided: the seed of the labels, where tokens are weighted; None: they are not.

    rider: held-out text that goes along. measured: facts for measurements.json, as they come.
    """

    token_ids: Sequence[Sequence[int]]
    precision: Precision
    folder: Path
    guided: int | None
    rider: Rider | None
    measured: dict[str, Any] = field(default_factory=dict)


def run_pass(
    recipe: Recipe, variants: Sequence[tuple[str, Context]], folder: Path, reporter: Reporter, ride: Ride | None = None
) -> PassResult:
    """Run the pass for (format, context) pairs; `folder` is where it leaves what a stopped one goes on from.

    ride: held-out text that goes along. It changes nothing of what is built.

    Raises PlanError, BuildError, WorkerDied if it ends early; Stopped if the user asked it to end.
    """
    names = ", ".join(context.variant for _, context in variants)
    if recipe.calibration is None:
        raise no_calibration(names)
    status(reporter, "", f"calibration pass for {names}")
    arguments = (recipe.calibration, recipe.path.parent, list(variants), folder, ride)
    return run_step("the calibration pass", reporter, _pass, *arguments, stops=True)


def _pass(
    reporter: Reporter, spec: Calibration, base: Path, variants: list[tuple[str, Context]], folder: Path,
    ride: Ride | None = None,
) -> PassResult:  # fmt: skip
    began = time.perf_counter()
    import torch

    from quantize.calibration.mix import CalibrationText
    from quantize.calibration.writing import read_text
    from quantize.evaluate.rider import Rider
    from quantize.formats import builders

    context = variants[0][1]
    torch.set_num_threads(context.limits.threads)
    say_how(context.limits, reporter)
    _import_transformers(context.checkpoint.folder)
    status(reporter, "", "reading the calibration text")
    started = time.perf_counter()
    found = read_text(spec, base, context.checkpoint, context.limits.own_device, reporter)
    text_seconds = time.perf_counter() - started
    variants = widened_all(variants, reporter)
    parts = [_Part(item, builders()[name], builders()[name].collector(item, reporter)) for name, item in variants]
    with _runner(context.limits, folder, reporter) as runner:
        precision = runner.fastest_precision if spec.precision == "auto" else spec.precision
        entry = CalibrationEntry(
            spec=CalibrationText(spec, base).stated() | {"precision": precision},
            hash=found.hash,
            sequences=len(found.token_ids),
            tokens=found.tokens,
            seed=spec.seed,
            parts=found.parts or None,
        )
        say_what_text(reporter, context, spec, found)
        journal = PassJournal(
            folder,
            _identity(context, entry, runner.device),
            reporter,
            seconds=SECONDS_BETWEEN_STATES if context.limits.on_gpu else 0.0,
        )
        seed = spec.seed if spec.guided else None
        rider = None if ride is None else Rider(ride, context.checkpoint, folder, reporter)
        material = _Material(found.token_ids, precision, folder, seed, rider)
        lacking = _resume(journal, parts, reporter) < block_count(context.checkpoint.config)
        with journal:
            if lacking:
                runner.run(journal, parts, material, reporter)
        device = runner.device
    for part in parts:
        _take(part, lambda part: part.collector.finish(), reporter)
    journal.finish()
    errors = {part.context.variant: part.error for part in parts if part.error is not None}
    seconds = {part.context.variant: round(part.seconds, 2) for part in parts}
    measured = {
        "seconds": round(time.perf_counter() - began, 2),
        "import_seconds": round(started - began, 2),
        "text_seconds": round(text_seconds, 2),
        "solve_seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(os.getpid()),
        **measured_on_gpu(context.limits),
        **material.measured,
    }
    return PassResult(entry, device, errors, measured, wide=variants[0][1].checkpoint.wide)


@dataclass(frozen=True)
class _Runner:
    """Who runs the blocks: this process, or the workers of a cluster. device: its kind, see processor.device_name."""

    device: str
    fastest_precision: Precision
    run: Callable[..., None]


@contextlib.contextmanager
def _runner(limits: RunLimits, folder: Path, reporter: Reporter) -> Iterator[_Runner]:
    from quantize.calibration.stream import fastest_precision
    from quantize.system.processor import device_name

    if limits.spread is None:
        yield _Runner(device_name(limits.device), fastest_precision(limits.device), _stream)
        return
    from quantize.build.spread.run import spread_over

    with spread_over(limits.spread, limits.device, folder, reporter) as cluster:
        yield _Runner(cluster.machine.device, cluster.machine.precision, partial(_spread, cluster, limits.spread))


def _resume(journal: PassJournal, parts: list[_Part], reporter: Reporter) -> int:
    """Have the parts go on from where they were; the number of blocks that all of them have."""
    for part in parts:
        part.blocks = journal.resume(part.context.scratch, part.collector)
    start, total = min(part.blocks for part in parts), block_count(parts[0].context.checkpoint.config)
    if any(part.blocks for part in parts):
        done = ", ".join(f"{part.context.variant} {part.blocks}" for part in parts)
        note(reporter, "", f"the calibration pass goes on after block {start} of {total} (done: {done})")
    return start


def _stream(journal: PassJournal, parts: list[_Part], material: _Material, reporter: Reporter) -> None:
    """Stream the blocks that a part still lacks through this process.

    Out of a GPU's memory, the pass goes on once more with its hidden states in the computer's. Raises OutOfMemory.
    """
    try:
        _stream_blocks(journal, parts, material, _spill(journal, parts, material.folder), reporter)
        return
    except (RuntimeError, QuantizeError) as exc:
        if not parts[0].context.limits.on_gpu or not is_out_of_memory(exc):
            raise
        warn(reporter, "", f"out of the GPU's memory: hidden states move to the computer's ({first_line(exc)})")
    give_back_gpu()
    spill = replace(_spill(journal, parts, material.folder), gpu_bytes=0)
    try:
        _stream_blocks(journal, parts, material, spill, reporter)
    except (RuntimeError, QuantizeError) as exc:
        if not is_out_of_memory(exc):
            raise
        raise OutOfMemory(
            f"the calibration pass ran out of the GPU's memory: {first_line(exc)}",
            hint="close what else uses the GPU, build fewer variants at once with --only, or use --device cpu",
        ) from exc


def _stream_blocks(
    journal: PassJournal, parts: list[_Part], material: _Material, spill: Spill, reporter: Reporter
) -> None:
    from quantize.calibration.stream import stream_blocks

    context = parts[0].context
    stream = stream_blocks(
        context.checkpoint, material.token_ids, device=context.limits.device, precision=material.precision, spill=spill,
        start_block=min(part.blocks for part in parts if part.error is None), reporter=reporter,
        guide=_guide(journal, context, material, reporter), passenger=material.rider,
    )  # fmt: skip
    for block in stream:

        def solve(part: _Part, block: Block = block) -> None:
            part.collector.add(block.index, [part.collector.solve(block)])

        _commit(journal, parts, block.index, solve, reporter)
        del block, solve
        if all(part.error is not None for part in parts):
            break


def _guide(
    journal: PassJournal, context: Context, material: _Material, reporter: Reporter
) -> TokenWeights | None:  # fmt: skip
    """What each token counts, where the recipe asks for it. Raises Stopped if the user asked for it."""
    if material.guided is None:
        return None
    from quantize.calibration.guide import GUIDE, Text, find_weights
    from quantize.calibration.token_weights import TokenWeights

    def after_block() -> None:
        if stop_asked(reporter):
            raise Stopped("stopped in the guided statistics", hint="run the same build again to go on there")

    started, device = time.perf_counter(), context.limits.device
    status(reporter, "", "guided statistics: the model forward and back, for what each token counts")
    table = find_weights(
        context.checkpoint, Text.of(material.token_ids, material.guided, device), material.folder / GUIDE,
        journal.identity, device=device, precision=material.precision, reporter=reporter, after_block=after_block,
    )  # fmt: skip
    material.measured["guided_seconds"] = round(time.perf_counter() - started, 2)
    return TokenWeights(table, (table,))


def _spill(journal: PassJournal, parts: list[_Part], folder: Path) -> Spill:
    """Where the pass keeps its hidden states."""
    from quantize.calibration.stream import Spill

    context = parts[0].context
    limits, solvers = context.limits, [(part.builder, part.context.options) for part in parts]
    budget, on_gpu = limits.memory_budget_bytes, limits.on_gpu
    gpu_bytes = free_gpu_bytes(limits.device) - gpu_pass_bytes(context.checkpoint, solvers) if on_gpu else 0
    if budget is not None:
        taken = host_bytes(context.checkpoint) if on_gpu else pass_bytes(context.checkpoint, solvers, limits.threads)
        budget = max(0, budget - taken)
    return Spill(folder, budget, journal.saved, journal.keep, max(0, gpu_bytes))


def _spread(
    cluster: SpreadPass, spread: PassSpread, journal: PassJournal, parts: list[_Part], material: _Material,
    reporter: Reporter,
) -> None:  # fmt: skip
    """Have the workers of a cluster run the blocks that a part still lacks."""
    from quantize.build.spread.passwork import PassPlan
    from quantize.build.spread.run import Lacking

    limits = replace(parts[0].context.limits, spread=None, threads=spread.cores)
    contexts = tuple((part.builder.name, replace(part.context, limits=limits)) for part in parts)
    token_ids = tuple(tuple(map(int, ids)) for ids in material.token_ids)
    plan = PassPlan(
        contexts, token_ids, material.precision, material.folder, material.guided, journal.identity
    )  # fmt: skip

    def take(index: int, solved: Mapping[int, Any], after: Sequence[SavedStates]) -> list[int]:
        def add(part: _Part) -> None:
            answers, seconds = solved[parts.index(part)]
            part.seconds += seconds
            for answer in answers:
                if isinstance(answer, QuantizeError):
                    raise answer
            part.collector.add(index, answers)

        _commit(journal, parts, index, add, reporter)
        if after:
            journal.commit_shares(after)
        return [number for number, part in enumerate(parts) if part.error is not None]

    config = parts[0].context.checkpoint.config
    layouts = list(block_layouts(config))
    lacking = [Lacking(part.blocks, [part.collector.pieces(layout) for layout in layouts]) for part in parts]
    cluster.run(plan, lacking, journal.saved_shares, take)


def _commit(
    journal: PassJournal, parts: list[_Part], index: int, step: Callable[[_Part], None], reporter: Reporter
) -> None:
    """Have the parts that lack a block take it, and record that they did. Raises Stopped if the user asked for it."""
    for part in parts:
        if part.blocks == index and part.error is None:
            _take(part, step, reporter)
            part.blocks += part.error is None
    taken = [part for part in parts if part.blocks == index + 1 and part.error is None]
    journal.commit(index + 1, {part.context.scratch: part.collector for part in taken})
    if stop_asked(reporter) and any(part.error is None for part in parts):
        total = block_count(parts[0].context.checkpoint.config)
        raise Stopped(f"stopped after block {index + 1} of {total}", hint="run the same build again to go on there")


def _import_transformers(folder: Path) -> None:
    """Spend the seconds of its imports, the model's own code among them, before the text's are counted; where something
    is missing, its users say so.
    """
    with contextlib.suppress(ImportError, OSError, ValueError, KeyError, TypeError):
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer  # noqa: F401 (naming loads)

        MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(folder))]


def _identity(context: Context, entry: CalibrationEntry, device: str) -> dict[str, Any]:
    """All that the statistics depend on, but for what goes into each variant's build key."""
    import torch

    from quantize.numerics.kernels import kernels_name

    limits = context.limits
    solved_by = {"kernels": kernels_name(torch.device(limits.device))} if limits.on_own_gpu else {}
    half = context.checkpoint.half
    return {
        **solved_by,
        **({} if half == "F16" else {"stored": half}),
        "source": context.source.digest,
        "calibration": entry.model_dump(mode="json"),
        "device": device,
        "tools": tool_versions(("torch", "transformers")),
    }


def _take(part: _Part, step: Callable[[_Part], None], reporter: Reporter) -> None:
    """Let one variant take its step; its failure is its own, but for what would be the next one's too.

    Raises DiskFullError, OutOfMemory: what is on record stays for the next build.
    """
    if part.error is not None:
        return
    started = time.perf_counter()
    try:
        step(part)
    except DiskFullError:
        raise
    except QuantizeError as exc:
        part.error = exc
    except (RuntimeError, ValueError, OSError) as exc:  # torch reports nearly everything as RuntimeError
        if is_disk_full(exc):
            raise disk_full(exc, part.context.scratch) from exc
        if is_out_of_memory(exc):
            raise
        part.error = BuildError(f"{part.context.variant}: {first_line(exc)}")
        part.error.__cause__ = exc
    part.seconds += time.perf_counter() - started
    if part.error is not None:
        warn(reporter, part.context.variant, f"leaves the calibration pass: {part.error.message}")
