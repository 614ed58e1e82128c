"""One calibration pass that serves every calibrated variant of a recipe, whatever their formats.

In: the recipe's calibration spec and the variants' contexts. Out: what the manifest says of the text, each variant's
error if it failed, measurements. The pass runs in a worker process; backends see its blocks through their collectors.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.architecture import block_count
from quantize.backends.base import Collector, Context
from quantize.errors import BuildError, QuantizeError, Stopped, first_line
from quantize.manifest import CalibrationEntry, tool_versions
from quantize.recipe import CalibrationSpec, Recipe
from quantize.report import Reporter, note, status, warn
from quantize.resume import PassJournal
from quantize.worker import run_step, stop_asked

ENOUGH_TOKENS_PER_CHANNEL = 4


@dataclass(frozen=True)
class PassResult:
    """What a pass leaves. errors: variant -> why it got nothing from the pass."""

    entry: CalibrationEntry
    errors: dict[str, QuantizeError]
    measurements: dict[str, Any]


@dataclass
class _Part:
    """One variant's part in the pass, until it fails. blocks: how many it has done, in this build or a stopped one."""

    context: Context
    collector: Collector
    blocks: int = 0
    seconds: float = 0.0
    error: QuantizeError | None = field(default=None)


def run_pass(recipe: Recipe, variants: Sequence[tuple[str, Context]], folder: Path, reporter: Reporter) -> PassResult:
    """Run the pass for (backend name, context) pairs; `folder` is where it leaves what a stopped one goes on from.

    Raises PlanError, BuildError, WorkerDied if it ends early; Stopped if the user asked it to end.
    """
    assert recipe.calibration is not None
    names = ", ".join(context.variant for _, context in variants)
    status(reporter, "", f"calibration pass for {names}")
    arguments = (recipe.calibration, recipe.path.parent, list(variants), folder)
    return run_step("the calibration pass", reporter, _pass, *arguments, stops=True)


def _pass(
    reporter: Reporter, spec: CalibrationSpec, base: Path, variants: list[tuple[str, Context]], folder: Path
) -> PassResult:
    import torch

    from quantize.activations import fastest_precision
    from quantize.backends import backends
    from quantize.calibration import load_calibration_set, pinned_spec

    context = variants[0][1]
    torch.set_num_threads(context.limits.threads)
    status(reporter, "", "reading the calibration text")
    started = time.perf_counter()
    found = load_calibration_set(spec, base, context.checkpoint.folder)
    text_seconds = round(time.perf_counter() - started, 2)
    precision = fastest_precision(context.limits.device) if spec.precision == "auto" else spec.precision
    entry = CalibrationEntry(
        spec=pinned_spec(spec) | {"precision": precision},
        hash=found.hash,
        sequences=len(found.token_ids),
        tokens=found.tokens,
        seed=spec.seed,
    )
    _warn_if_few(reporter, context, spec, len(found.token_ids), found.tokens)
    parts = [_Part(item, backends()[name].collector(item, reporter)) for name, item in variants]
    journal = PassJournal(folder, _identity(context, entry), reporter)
    _stream(journal, parts, found.token_ids, precision, folder, reporter)
    for part in parts:
        _take(part, lambda collector: collector.finish(), reporter)
    journal.finish()
    errors = {part.context.variant: part.error for part in parts if part.error is not None}
    seconds = {part.context.variant: round(part.seconds, 2) for part in parts}
    total = round(time.perf_counter() - started, 2)
    peak = _peak_memory_bytes()
    measured = {"seconds": total, "text_seconds": text_seconds, "solve_seconds": seconds, "peak_memory_bytes": peak}
    return PassResult(entry, errors, measured)


def _stream(
    journal: PassJournal, parts: list[_Part], token_ids: Any, precision: Any, folder: Path, reporter: Reporter
) -> None:
    """Stream the blocks that a part still lacks, and record each when every part has taken it."""
    from quantize.activations import Spill, stream_blocks

    context = parts[0].context
    total = block_count(context.checkpoint.config)
    for part in parts:
        part.blocks = journal.resume(part.context.scratch, part.collector)
    start = min(part.blocks for part in parts)
    if any(part.blocks for part in parts):
        done = ", ".join(f"{part.context.variant} {part.blocks}" for part in parts)
        note(reporter, "", f"the calibration pass goes on after block {start} of {total} (done: {done})")
    if start == total:
        return
    stream = stream_blocks(
        context.checkpoint, token_ids, device=context.limits.device, precision=precision, start_block=start,
        spill=Spill(folder, context.limits.memory_budget_bytes, journal.saved, journal.keep), reporter=reporter,
    )  # fmt: skip
    for block in stream:
        taking = [part for part in parts if part.blocks == block.index and part.error is None]
        for part in taking:
            _take(part, lambda collector, block=block: collector.add(block.index, collector.solve(block)), reporter)
        taken = [part for part in taking if part.error is None]
        block_number = block.index + 1
        journal.commit(block_number, {part.context.scratch: part.collector for part in taken})
        for part in taken:
            part.blocks = block_number
        del block
        if all(part.error is not None for part in parts):
            break
        if stop_asked(reporter):
            hint = "run the same build again to go on there"
            raise Stopped(f"stopped after block {block_number} of {total}", hint=hint)


def _identity(context: Context, entry: CalibrationEntry) -> dict[str, Any]:
    """All that the statistics depend on, but for what goes into each variant's build key."""
    import torch

    device = torch.device(context.limits.device).type
    name = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "source": context.source.digest,
        "calibration": entry.model_dump(mode="json"),
        "tools": tool_versions(("torch", "transformers")),
        "device": f"{device} {name}",
    }


def _take(part: _Part, step: Any, reporter: Reporter) -> None:
    """Let one variant take its step; its failure is its own."""
    if part.error is not None:
        return
    started = time.perf_counter()
    try:
        step(part.collector)
    except QuantizeError as exc:
        part.error = exc
    except (RuntimeError, ValueError, OSError) as exc:  # torch reports nearly everything as RuntimeError
        part.error = BuildError(f"{part.context.variant}: {first_line(exc)}")
        part.error.__cause__ = exc
    part.seconds += time.perf_counter() - started
    if part.error is not None:
        warn(reporter, part.context.variant, f"leaves the calibration pass: {part.error.message}")


def _warn_if_few(reporter: Reporter, context: Context, spec: CalibrationSpec, sequences: int, tokens: int) -> None:
    widest = max(info.shape[-1] for info in context.checkpoint.tensors.values() if len(info.shape) == 2)
    wanted = ENOUGH_TOKENS_PER_CHANNEL * widest
    if tokens < wanted:
        warn(reporter, "", f"calibration has {tokens:,} tokens; {wanted:,} or more suit a layer of {widest:,} inputs")
    if sequences < spec.samples:
        note(reporter, "", f"calibration has {sequences} sequences; the spec asks for {spec.samples}")


def _peak_memory_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
