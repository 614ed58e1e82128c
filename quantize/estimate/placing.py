"""Where a model goes: on a GPU, over several, in part, or on the CPU, by the memory that is free.

In: a Workload as on a GPU, the GPUs that its runtime sees, which of them is meant. Out: a Placing, or None where
nothing of it fits there. The estimate of a part is that of the layers on the GPU; the rest, and the words of the
vocabulary, stay in RAM. The arithmetic is vram.py's, the verdict fit.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quantize.estimate.fit import Fit, FitWord, Workload, judge
from quantize.runtimes.devices import Accelerator, DevicePlace
from quantize.system.sizes import memory_text


@dataclass(frozen=True)
class Placing:
    """A place, and how the estimate stands to what is free there. note: what of it is not the whole on one GPU."""

    place: DevicePlace
    fit: Fit
    note: str = ""


def place_on_gpu(
    workload: Workload, gpus: Sequence[Accelerator], meant: Accelerator, *, splits: bool
) -> Placing | None:
    """On the GPU that is meant, over all of its kind, or as many layers as fit. splits: the runtime can do the latter.

    A workload with gpu_layers is placed on the one GPU as it is.
    """
    fit = judge(workload.estimate(), meant.free_bytes)
    if fit.word is not FitWord.DOES_NOT_FIT:
        return Placing(DevicePlace(meant.device, workload.gpu_layers), fit)
    if not splits or workload.gpu_layers is not None:
        return None
    return _over_several(workload, gpus, meant) or _in_part(workload, meant)


def layers_that_fit(workload: Workload, free_bytes: int) -> int:
    """The most layers whose safe-upper figure is within what is usable; 0 for none."""
    fitting = [
        layers for layers in range(1, workload.shape.layers + 1)
        if judge(replace(workload, gpu_layers=layers).estimate(), free_bytes).word is FitWord.FITS
    ]  # fmt: skip
    return max(fitting, default=0)


def _over_several(workload: Workload, gpus: Sequence[Accelerator], meant: Accelerator) -> Placing | None:
    """Dealt by the free memory. Each GPU pays the overhead of the runtime for itself."""
    alike = [gpu for gpu in gpus if gpu.kind == meant.kind]
    whole = workload.estimate()
    overhead = whole.overhead_bytes * (len(alike) - 1)
    cell = replace(
        whole, expected_bytes=whole.expected_bytes + overhead, upper_bytes=whole.upper_bytes + 2 * overhead,
        overhead_bytes=whole.overhead_bytes + overhead,
    )  # fmt: skip
    free = sum(gpu.free_bytes for gpu in alike)
    fit = judge(cell, free)
    if len(alike) < 2 or fit.word is not FitWord.FITS:
        return None
    shares = tuple(round(gpu.free_bytes / free, 4) for gpu in alike)
    names = ", ".join(f"{share:.0%} on {gpu.device}" for share, gpu in zip(shares, alike, strict=True))
    return Placing(DevicePlace(meant.kind, None, shares), fit, f"too large for one GPU: {names}")


def _in_part(workload: Workload, meant: Accelerator) -> Placing | None:
    layers = layers_that_fit(workload, meant.free_bytes)
    if not layers:
        return None
    fit = judge(replace(workload, gpu_layers=layers).estimate(), meant.free_bytes)
    total = workload.shape.layers
    return Placing(
        DevicePlace(meant.device, layers), fit,
        f"{layers} of {total} layers on {meant.device} ({meant.name}), the others on the CPU: "
        f"{memory_text(meant.free_bytes)} are free there",
    )  # fmt: skip
