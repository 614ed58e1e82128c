"""Where llama.cpp has put a model: which layer is on which device, and how much memory there, by its own log.

In: lines of the log as they pass by. Out: layers and bytes by device, and what is not where it was asked to be.
"""

from __future__ import annotations

import re
from collections import Counter

from quantize.runtimes.llama_cpp.devices import device_name, is_device

CPU = "CPU"
_BUFFER = re.compile(r"\s(\S+)\s+(?:model|KV|RS|compute|output) buffer size\s*=\s*([\d.]+) MiB")
_ASSIGNED = re.compile(r"layer\s+(\d+) assigned to device (\S+?)(?:,|\s|$)")


class Placed:
    """What the log has told so far."""

    def __init__(self) -> None:
        self._layers: dict[int, str] = {}
        self.buffer_bytes: Counter[str] = Counter()

    def line(self, line: str) -> None:
        """Take one line. A layer that is told of again has moved."""
        assigned = _ASSIGNED.search(line)
        if assigned is not None:
            self._layers[int(assigned[1])] = assigned[2]
            return
        buffer = _BUFFER.search(line)
        if buffer is not None:  # memory that is the host's, for copying, is the CPU's
            device = CPU if buffer[1].endswith("_Host") else buffer[1]
            self.buffer_bytes[device] += round(float(buffer[2]) * 2**20)

    @property
    def layers(self) -> dict[str, int]:
        """How many layers are on which device, the output among them."""
        return dict(Counter(self._layers.values()))

    @property
    def gpu_bytes(self) -> int:
        """Of all buffers on GPUs, which are known by name: what a CPU keeps for itself has names of its own."""
        return sum(size for name, size in self.buffer_bytes.items() if device_name(name) is not None)

    def astray(self, device: str, gpu_layers: int | None) -> str:
        """What is not where it was asked to be, in words; "" if all is.

        device: cpu, cuda:N, or cuda for several. gpu_layers: how many layers were to be on the GPU; None for all.
        """
        total = len(self._layers)
        if not total:
            return "llama.cpp does not say where the layers are"
        off = Counter({name: count for name, count in self.layers.items() if not _is(name, device)})
        if device != "cpu" and gpu_layers is not None:
            off[CPU] -= max(0, total - gpu_layers)
        where = " and ".join(f"{count} on {name}" for name, count in sorted(off.items()) if count > 0)
        return f"of {total} layers, {where} instead of {device}" if where else ""


def _is(name: str, device: str) -> bool:
    """Whether a device of llama.cpp's (CPU, CUDA0, ROCm1, Vulkan0, MTL0) is the one that was asked for."""
    known = device_name(name)
    return name == CPU if device == "cpu" else known is not None and is_device(known, device)
