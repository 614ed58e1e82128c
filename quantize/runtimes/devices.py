"""What a model can be computed on, by the names that people give.

In: a word (auto, gpu, cpu, cuda:1, vulkan:0, metal), the GPUs that a runtime sees. Out: the ones that are meant.
Whether a model fits there is left to estimate/placing.py. Only light imports.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from quantize.errors import UsageError

CPU, AUTO, ANY_GPU = "cpu", "auto", "gpu"
KINDS = ("cuda", "rocm", "vulkan", "sycl", "metal")
NAME = re.compile(rf"({'|'.join(KINDS)})(?::(\d{{1,3}}))?")


@dataclass(frozen=True)
class Accelerator:
    """A GPU as a runtime sees it. device: what people call it, such as cuda:0. free_bytes: of its memory, now."""

    device: str
    name: str
    total_bytes: int
    free_bytes: int

    @property
    def kind(self) -> str:
        """cuda, vulkan: without the number."""
        return self.device.partition(":")[0]


@dataclass(frozen=True)
class DevicePlace:
    """Where a model is computed. device: cpu or a GPU's name. gpu_layers: None is all, where a runtime can split.

    shares: how the layers are dealt to all the GPUs that the runtime sees, in their order; () for one GPU. streamed:
    block by block, which only measuring can do.
    """

    device: str = CPU
    gpu_layers: int | None = None
    shares: tuple[float, ...] = ()
    streamed: bool = False

    @property
    def kind(self) -> str:
        """cpu, cuda, vulkan: without the number."""
        return self.device.partition(":")[0]


ON_CPU = DevicePlace()


def check_name(wanted: str) -> str:
    """The device as it is named from here on: cuda is cuda:0. Raises UsageError: it is the name of none."""
    if wanted in (CPU, AUTO, ANY_GPU):
        return wanted
    found = NAME.fullmatch(wanted)
    if found is None:
        hint = f"use auto, cpu, gpu, or one of {', '.join(KINDS)} with a number: cuda:0"
        raise UsageError(f"{wanted!r} is no device", hint=hint)
    return f"{found[1]}:{int(found[2] or 0)}"


def choose(wanted: str, gpus: Sequence[Accelerator]) -> Accelerator | None:
    """The GPU that a word means, of those that are there: of several the freest, for auto and gpu; None is the CPU.

    Raises UsageError: it is the name of no device. LookupError: there is no such GPU, which the caller explains.
    """
    device = check_name(wanted)
    if device == CPU or (device == AUTO and not gpus):
        return None
    meant = gpus if device in (AUTO, ANY_GPU) else [gpu for gpu in gpus if gpu.device == device]
    if not meant:
        raise LookupError(device)
    return max(meant, key=lambda gpu: gpu.free_bytes)
