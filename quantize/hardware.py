"""What a model could run on: a table of cards by name, and this machine's own GPU, memory and cores.

In: a card's name as people write it ("RTX 4060 8GB"), a size ("8GiB"), or nothing. Out: a Card, or the Machine.
No torch: the GPU is asked through nvidia-smi, memory and cores through /proc, /sys/fs/cgroup and sysconf.
"""

from __future__ import annotations

import difflib
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import UsageError

GIB = 2**30
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_LARGEST_SIZE = 2**60
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits")

# GiB as the makers print it; a "24 GB" card has 24 x 2^30 bytes, less what its driver keeps.
_CARDS_GIB: dict[str, int] = {
    "GTX 1060": 6, "GTX 1070": 8, "GTX 1080": 8, "GTX 1080 Ti": 11, "GTX 1650": 4, "GTX 1660": 6, "GTX 1660 Super": 6,
    "RTX 2060": 6, "RTX 2060 12GB": 12, "RTX 2070": 8, "RTX 2080": 8, "RTX 2080 Ti": 11,
    "RTX 3050": 8, "RTX 3050 6GB": 6, "RTX 3060": 12, "RTX 3060 8GB": 8, "RTX 3060 Ti": 8, "RTX 3060 Laptop": 6,
    "RTX 3070": 8, "RTX 3070 Ti": 8, "RTX 3070 Laptop": 8, "RTX 3080": 10, "RTX 3080 12GB": 12, "RTX 3080 Ti": 12,
    "RTX 3090": 24, "RTX 3090 Ti": 24,
    "RTX 4050 Laptop": 6, "RTX 4060": 8, "RTX 4060 Laptop": 8, "RTX 4060 Ti": 8, "RTX 4060 Ti 16GB": 16,
    "RTX 4070": 12, "RTX 4070 Laptop": 8, "RTX 4070 Super": 12, "RTX 4070 Ti": 12, "RTX 4070 Ti Super": 16,
    "RTX 4080": 16, "RTX 4080 Laptop": 12, "RTX 4080 Super": 16, "RTX 4090": 24, "RTX 4090 Laptop": 16,
    "RTX 5050": 8, "RTX 5060": 8, "RTX 5060 Ti": 8, "RTX 5060 Ti 16GB": 16, "RTX 5070": 12, "RTX 5070 Ti": 16,
    "RTX 5080": 16, "RTX 5090": 32, "RTX 5090 Laptop": 24,
    "RTX A2000": 6, "RTX A2000 12GB": 12, "RTX A4000": 16, "RTX A5000": 24, "RTX A6000": 48,
    "RTX 2000 Ada": 16, "RTX 4000 Ada": 20, "RTX 5000 Ada": 32, "RTX 6000 Ada": 48, "RTX PRO 6000 Blackwell": 96,
    "Tesla P4": 8, "Tesla P40": 24, "Tesla P100": 16, "Tesla T4": 16, "Tesla V100": 16, "Tesla V100 32GB": 32,
    "A2": 16, "A10": 24, "A10G": 24, "A16": 16, "A30": 24, "A40": 48, "A100": 40, "A100 80GB": 80,
    "L4": 24, "L40": 48, "L40S": 48, "H100": 80, "H100 NVL": 94, "H200": 141, "B200": 180, "GH200": 96,
    "RX 6600": 8, "RX 6700 XT": 12, "RX 6800": 16, "RX 7600": 8, "RX 7600 XT": 16, "RX 7700 XT": 12, "RX 7800 XT": 16,
    "RX 7900 XT": 20, "RX 7900 XTX": 24, "RX 9070 XT": 16, "Instinct MI250X": 128, "Instinct MI300X": 192,
    "Arc A750": 8, "Arc A770": 16, "Arc B580": 12,
    "Jetson Orin Nano": 8, "Jetson Orin NX": 16, "Jetson AGX Orin": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Card:
    """A graphics card, or a plain size. known: found in the table or on this machine, not just a number of bytes."""

    name: str
    vram_bytes: int
    known: bool = True


@dataclass(frozen=True)
class LocalGpu:
    """A GPU of this machine: bytes in total, and bytes that are taken already."""

    name: str
    vram_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class Machine:
    """This machine as a process here may use it: memory is the smaller of the RAM and the cgroup's limit."""

    gpus: tuple[LocalGpu, ...]
    ram_bytes: int
    available_ram_bytes: int
    cores: int


def parse_size(text: str) -> int:
    """Bytes of "8GiB", "7.5 GB", "800M" or a plain number, above 0. Raises UsageError.

    KB, MB, GB and TB are powers of 1000; KiB to TiB, and bare K, M, G and T, of 1024: an "8G" card has 8 GiB.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d{1,2})?)\s*([kmgt]?i?b?)\s*", text.lower())
    unit = match.group(2) if match else ""
    if unit and not unit.endswith("b"):
        unit += "b" if unit.endswith("i") else "ib"
    size = float(match.group(1)) * _UNITS.get(unit, 0) if match else 0.0
    if not 1 <= size < _LARGEST_SIZE:
        raise UsageError(f"{text!r} is no size", hint="write it like 8GiB, 7.5GB or 800MiB")
    return int(size)


def find_card(name: str) -> Card:
    """The card that `name` means, whatever the case, spaces, maker's name or "8GB" behind it.

    Raises UsageError with the nearest names, and where the size in the name is not one that the card was sold with.
    """
    wanted, size = _split_size(name)
    matches = [known for known in _CARDS_GIB if _split_size(known)[0] == wanted]
    if not matches:
        raise UsageError(f"unknown card {name!r}", hint=_card_hint(wanted))
    if size is None:
        best = min(matches, key=lambda known: ("GB" in known, _CARDS_GIB[known]))
        return Card(best, _CARDS_GIB[best] * GIB)
    for known in matches:
        if _CARDS_GIB[known] == size:
            return Card(known, size * GIB)
    sizes = " or ".join(f"{_CARDS_GIB[known]} GB" for known in matches)
    raise UsageError(f"{matches[0]} has {sizes}, not {size} GB", hint="give the memory itself with --vram")


def card_of(gpu: str | None = None, vram: str | None = None) -> Card | None:
    """The card of the options --gpu and --vram; --vram alone is an unnamed card, both together a card cut to that."""
    if vram is None:
        return None if gpu is None else find_card(gpu)
    size = parse_size(vram)
    return Card(vram.strip() if gpu is None else f"{gpu} ({vram.strip()})", size, known=False)


def card_names() -> tuple[str, ...]:
    """All names in the table, in its order."""
    return tuple(_CARDS_GIB)


def detect() -> Machine:
    """Look at this machine; parts that can't be read are left out, never guessed."""
    total, available = ram()
    return Machine(gpus=_nvidia_gpus(), ram_bytes=total, available_ram_bytes=available, cores=usable_cores())


def memory_text(size_bytes: int) -> str:
    """Bytes of memory for people, in binary units as cards are sold."""
    return f"{size_bytes / GIB:.2f} GiB"


def ram() -> tuple[int, int]:
    """(total, available) bytes of RAM that a process here may use: the container's where its cgroup has a limit."""
    total, available = _memory()
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
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    except OSError:
        names = []
    return str(names[0]) if names else platform.processor() or platform.machine()


def _split_size(name: str) -> tuple[str, int | None]:
    """("rtx4060ti", 16) of "NVIDIA GeForce RTX 4060 Ti 16GB"; letters and digits only, no maker's name."""
    text = name.lower()
    size = re.search(r"(?<![\d.])(\d+)\s*gi?b\b", text)
    if size:
        text = text[: size.start()] + text[size.end() :]
    text = re.sub(r"\b(mobile|max-?q)\b", "laptop", text)
    text = re.sub(r"\b(nvidia|geforce|amd|radeon|intel|tesla|gpu|graphics|pcie|sxm\d?|hbm\w*|generation)\b", "", text)
    return re.sub(r"[^a-z0-9]", "", text), int(size.group(1)) if size else None


def _card_hint(wanted: str) -> str:
    short = {_split_size(known)[0]: known for known in reversed(_CARDS_GIB)}
    near = difflib.get_close_matches(wanted, short, n=3, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(short[name] for name in near)}? Any size works too: --vram 8GiB"
    return "give the memory itself with --vram, for example --vram 8GiB"


def _nvidia_gpus() -> tuple[LocalGpu, ...]:
    if shutil.which(_NVIDIA_SMI[0]) is None:
        return ()
    try:
        answer = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    found = []
    for line in answer.splitlines():
        parts = [part.strip() for part in line.rsplit(",", 2)]
        if len(parts) == 3 and parts[1].isdigit():
            used = int(parts[2]) if parts[2].isdigit() else 0
            found.append(LocalGpu(parts[0], int(parts[1]) * 2**20, used * 2**20))
    return tuple(found)


def _memory() -> tuple[int, int]:
    """(total, available) bytes of RAM."""
    try:
        fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text("ascii"), re.MULTILINE))
        return int(fields["MemTotal"]) * 1024, int(fields["MemAvailable"]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:  # macOS and others: no figure for what is available, so the total stands for it
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0, 0
    return total, total


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
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = (root / "cpu.max").read_text("ascii").split()
        if quota != "max":
            cores = min(cores, max(1, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        pass
    return cores


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text("ascii").strip())
    except (OSError, ValueError):
        return None
