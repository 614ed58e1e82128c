"""This machine as a process here may use it: its GPUs, memory and cores, within the container's limits.

In: nothing, or a process id. Out: the Machine, or its parts. No torch: psutil, the GPU's driver and /sys/fs/cgroup.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from quantize.system.gpus import LocalGpu, nvidia_gpus
from quantize.system.processor import cpu_field


@dataclass(frozen=True)
class Machine:
    """This machine as a process here may use it: memory is the smaller of the RAM and the cgroup's limit."""

    gpus: tuple[LocalGpu, ...]
    ram_bytes: int
    available_ram_bytes: int
    cores: int


def detect() -> Machine:
    """Look at this machine; parts that can't be read are left out, never guessed."""
    total, available = ram()
    gpus = tuple(gpu if gpu.vram_bytes else LocalGpu(gpu.name, total, total - available) for gpu in nvidia_gpus())
    return Machine(gpus=gpus, ram_bytes=total, available_ram_bytes=available, cores=usable_cores())


def ram() -> tuple[int, int]:
    """(total, available) bytes of RAM that a process here may use: the container's where its cgroup has a limit."""
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    limit, used = _cgroup_memory()
    if limit is not None and limit < total:
        total, available = limit, min(available, max(0, limit - used))
    return total, available


def describe_machine() -> dict[str, Any]:
    """What a figure was measured on, as plain data: processor, cores, RAM, GPUs."""
    machine = detect()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "cores": machine.cores,
        "ram_bytes": machine.ram_bytes,
        "gpus": [gpu.name for gpu in machine.gpus],
    }


def processor_name() -> str:
    """The processor as it calls itself, or its architecture where the system does not say."""
    return cpu_field("model name") or platform.processor() or platform.machine()


def _cgroup_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[int | None, int]:
    """(limit, used) bytes of this process's cgroup, version 2 or 1; (None, 0) where there is no limit."""
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit = _read_int(root / limit_name)
        if limit is not None and limit < 2**60:
            return limit, _read_int(root / used_name) or 0
    return None, 0


def usable_cores(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: its affinity, cut by the cgroup's quota (rounded up)."""
    cores = _affinity()
    try:
        quota, period = (root / "cpu.max").read_text("ascii").split()
        if quota != "max":
            cores = min(cores, max(1, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        pass
    return cores


def _affinity() -> int:
    """Cores that the scheduler gives this process; macOS does not tell, and gives them all."""
    process = psutil.Process()
    return len(process.cpu_affinity() or ()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1


def resident_bytes(pid: int | None = None) -> int:
    """Resident memory of a process, this one by default, in bytes; 0 where it is gone or not ours to look at."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text("ascii").strip())
    except (OSError, ValueError):
        return None
