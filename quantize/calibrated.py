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

from quantize.backends.base import Collector, Context
from quantize.errors import BuildError, QuantizeError, first_line
from quantize.manifest import CalibrationEntry
from quantize.recipe import CalibrationSpec, Recipe
from quantize.report import Reporter, note, status, warn
from quantize.worker import run_step

ENOUGH_TOKENS_PER_CHANNEL = 4


@dataclass(frozen=True)
class PassResult:
    """What a pass leaves. errors: variant -> why it got nothing from the pass."""

    entry: CalibrationEntry
    errors: dict[str, QuantizeError]
    measurements: dict[str, Any]


@dataclass
class _Part:
    """One variant's part in the pass, until it fails."""

    context: Context
    collector: Collector
    seconds: float = 0.0
    error: QuantizeError | None = field(default=None)


def run_pass(recipe: Recipe, variants: Sequence[tuple[str, Context]], reporter: Reporter) -> PassResult:
    """Run the pass for (backend name, context) pairs. Raises PlanError, BuildError, WorkerDied if it ends early."""
    assert recipe.calibration is not None
    names = ", ".join(context.variant for _, context in variants)
    status(reporter, "", f"calibration pass for {names}")
    return run_step("the calibration pass", reporter, _pass, recipe.calibration, recipe.path.parent, list(variants))


def _pass(reporter: Reporter, spec: CalibrationSpec, base: Path, variants: list[tuple[str, Context]]) -> PassResult:
    import torch

    from quantize.activations import fastest_precision, stream_blocks
    from quantize.backends import backends
    from quantize.calibration import load_calibration_set, pinned_spec

    context = variants[0][1]
    torch.set_num_threads(context.limits.threads)
    status(reporter, "", "reading the calibration text")
    started = time.perf_counter()
    found = load_calibration_set(spec, base, context.checkpoint.folder)
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
    stream = stream_blocks(
        context.checkpoint, found.token_ids, device=context.limits.device, precision=precision,
        memory_budget_bytes=context.limits.memory_budget_bytes, workdir=context.scratch, reporter=reporter,
    )  # fmt: skip
    for block in stream:
        for part in parts:
            _take(part, lambda collector, block=block: collector.add_block(block), reporter)
        del block
        if all(part.error is not None for part in parts):
            break
    for part in parts:
        _take(part, lambda collector: collector.finish(), reporter)
    errors = {part.context.variant: part.error for part in parts if part.error is not None}
    seconds = {part.context.variant: round(part.seconds, 2) for part in parts}
    total = round(time.perf_counter() - started, 2)
    peak = _peak_memory_bytes()
    return PassResult(entry, errors, {"seconds": total, "solve_seconds": seconds, "peak_memory_bytes": peak})


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
