"""The NVIDIA GPUs of this machine, through the driver's own library (NVML).

In: nothing, or process ids. Out: each card's name and memory, and what processes take of it. Where there is no driver
there are no GPUs; a figure that a driver does not give (WSL2, Jetson) is None, never a guess.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class LocalGpu:
    """A GPU of this machine: bytes in total, and bytes that are taken already."""

    name: str
    vram_bytes: int
    used_bytes: int


class Gpus:
    """An open connection to the driver, for figures that are asked again and again. False where there is no GPU."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []
        with contextlib.suppress(ImportError):
            self._nvml = importlib.import_module("pynvml")
        if self._nvml is None or self._asked(self._nvml.nvmlInit, failed=False) is False:
            return
        count = self._asked(self._nvml.nvmlDeviceGetCount) or 0
        handles = [self._asked(self._nvml.nvmlDeviceGetHandleByIndex, index) for index in range(count)]
        self._handles = [handle for handle in handles if handle is not None]

    def __bool__(self) -> bool:
        return bool(self._handles)

    def found(self) -> Iterator[LocalGpu]:
        """Every GPU whose memory the driver tells, in the driver's order (by PCI address)."""
        for handle in self._handles:
            memory = self._asked(self._nvml.nvmlDeviceGetMemoryInfo, handle)
            if memory is not None:
                yield LocalGpu(self._name(handle), int(memory.total), int(memory.used))

    def used(self, pids: set[int]) -> tuple[int | None, int]:
        """(bytes of these processes, bytes in use on all devices); None where the driver does not name them."""
        mine: list[int] = []
        for handle in self._handles:
            running = self._asked(self._nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
            mine += [int(item.usedGpuMemory) for item in running if item.pid in pids and item.usedGpuMemory]
        return (sum(mine) if mine else None), sum(gpu.used_bytes for gpu in self.found())

    def _name(self, handle: Any) -> str:
        name = self._asked(self._nvml.nvmlDeviceGetName, handle) or "NVIDIA GPU"
        return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)

    def _asked(self, question: Callable[..., Value], *arguments: Any, failed: Any = None) -> Value | Any:
        """The driver's answer, or `failed` where it has none."""
        try:
            return question(*arguments)
        except self._nvml.NVMLError:
            return failed


def nvidia_gpus() -> tuple[LocalGpu, ...]:
    """The GPUs of this machine now; none where there is no driver."""
    return tuple(Gpus().found())
