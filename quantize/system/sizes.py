"""Numbers of bytes as people write and read them: "8GiB" to bytes, bytes to "1.2 GB" or "3.45 GiB".

In: text or bytes. Out: bytes or text. Files and downloads are shown in decimal units, memory in binary ones.
"""

from __future__ import annotations

import re

from quantize.errors import UsageError

GIB = 2**30
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_LARGEST_SIZE = 2**60


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


def size_text(size_bytes: int) -> str:
    """Bytes of a file for people, in decimal units as disks and downloads are: `12 B`, `45.6 MB`, `1.23 GB`."""
    value, unit = float(size_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    digits = {"B": 0, "kB": 1, "MB": 1}.get(unit, 2)
    return f"{value:.{digits}f} {unit}"


def mebibytes_text(size_bytes: int) -> str:
    """Bytes that a process took, or must be given: `1,234 MiB`."""
    return f"{size_bytes / 2**20:,.0f} MiB"


def memory_text(size_bytes: int) -> str:
    """Bytes of memory for people, in binary units as cards are sold: `7.50 GiB`."""
    return f"{size_bytes / GIB:.2f} GiB"
