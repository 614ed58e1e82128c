"""What a calibration pass tells: where there is a faster way, whether the text is enough, what it took of a GPU.

In: the limits of a build, the text as it was read. Out: events, facts for measurements.json.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantize.events import Reporter, note, warn
from quantize.formats.base import Context, RunLimits
from quantize.recipe.calibration import Calibration
from quantize.system.gpus import nvidia_gpus

if TYPE_CHECKING:
    from quantize.calibration.text import CalibrationSet

ENOUGH_TOKENS_PER_CHANNEL = 4


def say_how(limits: RunLimits, reporter: Reporter) -> None:
    """Where there is a faster way than the one that the pass takes."""
    import torch

    from quantize.numerics.kernels import trouble

    if limits.spread is not None:
        return
    if limits.on_gpu:
        if (why := trouble(torch.device(limits.device))) is not None:
            warn(reporter, "", f"{why}: GPTQ and clip searches run in many small steps, several times slower")
    elif torch.cuda.is_available() and (gpus := nvidia_gpus()):
        note(reporter, "", f"a GPU is there ({gpus[0].name}), and the pass runs on the CPU: --device cuda is faster")


def measured_on_gpu(limits: RunLimits) -> dict[str, Any]:
    """The most of a GPU's memory that was in use, and that was held, and what solved; nothing on a CPU."""
    import torch

    from quantize.numerics.kernels import kernels_name

    if not limits.on_own_gpu:
        return {}
    return {
        "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated(limits.device),
        "peak_gpu_reserved_bytes": torch.cuda.max_memory_reserved(limits.device),
        "kernels": kernels_name(torch.device(limits.device)),
    }


def _asked(spec: Calibration, found: CalibrationSet) -> int:
    """How many sequences a spec asks for, without the parts that this source goes without."""
    if not found.parts:
        return spec.samples
    return sum(part.samples for part, got in zip(spec.parts, found.parts, strict=True) if got.left_out is None)


def say_what_text(reporter: Reporter, context: Context, spec: Calibration, found: CalibrationSet) -> None:
    """What is left out of it or was done to it, and where there is less than asked for, or than suits the model."""
    for shown in found.parts:
        if shown.left_out is not None:
            warn(reporter, "", f"calibration goes without {shown.dataset}: {shown.left_out}")
    for said in found.remarks():
        warn(reporter, "", f"calibration: {said}")
    tokens, sequences, asked = found.tokens, len(found.token_ids), _asked(spec, found)
    widest = max(info.shape[-1] for info in context.checkpoint.tensors.values() if len(info.shape) == 2)
    wanted = ENOUGH_TOKENS_PER_CHANNEL * widest
    if tokens < wanted:
        warn(reporter, "", f"calibration has {tokens:,} tokens; {wanted:,} or more suit a layer of {widest:,} inputs")
    if sequences < asked:
        note(reporter, "", f"calibration has {sequences} sequences; the spec asks for {asked}")
