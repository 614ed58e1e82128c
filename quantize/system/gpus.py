"""The NVIDIA GPUs of this machine, through the driver's own library (NVML).

In: nothing, or process ids. Out: each card's name and memory, and what processes take of it. Where there is no driver
there are no GPUs; a figure that a driver does not give (WSL2, Jetson) is None, never a guess.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

Value = TypeVar("Value")
VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"


@dataclass(frozen=True)
class LocalGpu:
    """A GPU of this machine: bytes in total, and bytes that are taken already. 0 bytes: the driver does not tell, as of
    a card that shares the machine's memory (Jetson, GB10).
    """

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
        self._handles = self._visible()

    @property
    def driver(self) -> str | None:
        """The driver's version."""
        if not self._handles:
            return None
        version = self._asked(self._nvml.nvmlSystemGetDriverVersion)
        return version.decode("ascii", "replace") if isinstance(version, bytes) else version

    def __bool__(self) -> bool:
        return bool(self._handles)

    def _visible(self) -> list[Any]:
        """What CUDA shows of them, in its order: by CUDA_VISIBLE_DEVICES, up to the first that is none, as it does.

        Numbers are those of the PCI addresses: CUDA counts so in every process of ours, see `number_by_address`.
        """
        count = self._asked(self._nvml.nvmlDeviceGetCount) or 0
        every = [self._asked(self._nvml.nvmlDeviceGetHandleByIndex, index) for index in range(count)]
        chosen = os.environ.get(VISIBLE)
        if chosen is None:
            return [handle for handle in every if handle is not None]
        handles = []
        for word in map(str.strip, chosen.split(",")):
            handle = every[int(word)] if word.isdecimal() and int(word) < count else self._by_uuid(word, every)
            if handle is None:
                break
            handles.append(handle)
        return handles

    def _by_uuid(self, word: str, every: list[Any]) -> Any:
        """The card whose name begins so (GPU-…), or the part of one (MIG-…); None where there is none."""
        if word.startswith("MIG-"):
            return self._asked(self._nvml.nvmlDeviceGetHandleByUUID, word)
        if not word.startswith("GPU-"):
            return None
        named = [handle for handle in every if str(self._uuid(handle)).startswith(word)]
        return named[0] if len(named) == 1 else None

    def _uuid(self, handle: Any) -> Any:
        uuid = self._asked(self._nvml.nvmlDeviceGetUUID, handle)
        return uuid.decode("ascii", "replace") if isinstance(uuid, bytes) else uuid

    def found(self) -> Iterator[LocalGpu]:
        """Every GPU that CUDA shows: the first is cuda:0. A card that shares the machine's memory has 0 bytes."""
        for handle in self._handles:
            memory = self._asked(self._nvml.nvmlDeviceGetMemoryInfo, handle)
            total, used = (int(memory.total), int(memory.used)) if memory is not None else (0, 0)
            yield LocalGpu(self._name(handle), total, used)

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


def driver_version() -> str | None:
    """Of the NVIDIA driver, such as 580.65.06; None where there is none, or it does not tell."""
    return Gpus().driver


def number_by_address() -> None:
    """Have CUDA number cards by their PCI addresses, as the driver does, not the fastest first: `cuda:1` is then the
    card that nvidia-smi calls 1. For this process and those that it starts; what the user has set stands.
    """
    os.environ.setdefault(ORDER, "PCI_BUS_ID")


def nvidia_gpus() -> tuple[LocalGpu, ...]:
    """The GPUs of this machine now; none where there is no driver."""
    return tuple(Gpus().found())
