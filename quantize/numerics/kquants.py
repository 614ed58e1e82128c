"""The blocks that llama.cpp keeps quantized weights in: bytes to integers and scales, and back.

In: bytes of whole blocks, or Blocks. Out: Blocks, or the same bytes. Left to others: which integers (grid_solver).
Every type is a grid: a weight is d * scale * level - dmin * min, with float16 d and dmin for a block of 32 or 256
values, integer scales and mins for each 16 or 32 of them, and a level for each code: an integer, or an entry of a
codebook. The layouts are those of ggml-common.h (structs block_*) and the dequantize_row_* functions of ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Halves = NDArray[np.float16]
    Integers = NDArray[np.int16]

CODEBOOK = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # kvalues_iq4nl


@dataclass(frozen=True)
class Grid:
    """What a type can hold.

    block: values that share d. sub: values that share an integer scale and min. fields: of a block's bytes, in order,
    with their sizes. levels: the value of each code. lowest: the first code that llama.cpp gives out. scales: the
    least and the largest integer scale; None where d is all there is. mins: the largest integer min; 0 where the
    minimum is a float16 of its own, of either sign; None where there is none.
    """

    name: str
    block: int
    sub: int
    fields: tuple[tuple[str, int], ...]
    levels: tuple[int, ...]
    lowest: int = 0
    scales: tuple[int, int] | None = None
    mins: int | None = None

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return sum(size for _, size in self.fields)

    @property
    def is_even(self) -> bool:
        """Whether the levels are consecutive integers."""
        return self.levels is not CODEBOOK


@dataclass(frozen=True)
class Blocks:
    """Decoded blocks. d, dmin: float16 [blocks]. scales, mins: int16 [blocks, block / sub]. codes: uint8 [blocks,
    block].

    A weight is d * scale * level[code] - dmin * min. Types without integer scales have scale 1; those with a minimum of
    their own have it in dmin, and min -1; those without any have min 0.
    """

    d: Halves
    dmin: Halves
    scales: Integers
    mins: Integers
    codes: Bytes


def _even(bits: int, zero: int) -> tuple[int, ...]:
    return tuple(code - zero for code in range(2**bits))


_D, _MIN = ("d", 2), ("dmin", 2)
GRIDS: Mapping[str, Grid] = {
    grid.name: grid
    for grid in (
        Grid("Q4_0", 32, 32, (_D, ("low", 16)), _even(4, 8)),
        Grid("Q4_1", 32, 32, (_D, _MIN, ("low", 16)), _even(4, 0), mins=0),
        Grid("Q5_0", 32, 32, (_D, ("high", 4), ("low", 16)), _even(5, 16)),
        Grid("Q5_1", 32, 32, (_D, _MIN, ("high", 4), ("low", 16)), _even(5, 0), mins=0),
        Grid("Q8_0", 32, 32, (_D, ("low", 32)), _even(8, 128), lowest=1),
        Grid("IQ4_NL", 32, 32, (_D, ("low", 16)), CODEBOOK),
        Grid("IQ4_XS", 256, 32, (_D, ("scales", 6), ("low", 128)), CODEBOOK, scales=(-32, 31)),
        Grid("Q2_K", 256, 16, (("scales", 16), ("low", 64), _D, _MIN), _even(2, 0), scales=(0, 15), mins=15),
        Grid("Q3_K", 256, 16, (("high", 32), ("low", 64), ("scales", 12), _D), _even(3, 4), scales=(-32, 31)),
        Grid("Q4_K", 256, 32, (_D, _MIN, ("scales", 12), ("low", 128)), _even(4, 0), scales=(0, 63), mins=63),
        Grid(
            "Q5_K", 256, 32, (_D, _MIN, ("scales", 12), ("high", 32), ("low", 128)), _even(5, 0), scales=(0, 63),
            mins=63,
        ),
        Grid("Q6_K", 256, 16, (("low", 128), ("high", 64), ("scales", 16), _D), _even(6, 32), scales=(-128, 127)),
    )
}  # fmt: skip

# Type -> for the low and the high bits of its codes: bits in a byte's part, and bytes between a byte's two parts.
_CODES: Mapping[str, tuple[tuple[int, int], tuple[int, int] | None]] = {
    "Q4_0": ((4, 16), None),
    "Q4_1": ((4, 16), None),
    "Q5_0": ((4, 16), (1, 1)),
    "Q5_1": ((4, 16), (1, 1)),
    "Q8_0": ((8, 32), None),
    "IQ4_NL": ((4, 16), None),
    "IQ4_XS": ((4, 16), None),
    "Q2_K": ((2, 32), None),
    "Q3_K": ((2, 32), (1, 32)),
    "Q4_K": ((4, 32), None),
    "Q5_K": ((4, 32), (1, 32)),
    "Q6_K": ((4, 64), (2, 32)),
}


def decode(grid: Grid, data: Bytes) -> Blocks:
    """Take blocks apart. data: uint8 [blocks, block_bytes]."""
    parts, start = {}, 0
    for name, size in grid.fields:
        parts[name] = np.ascontiguousarray(data[:, start : start + size])
        start += size
    (bits, stride), high = _CODES[grid.name]
    codes = _unpack(parts["low"], bits, stride)
    if high is not None:
        codes |= _unpack(parts["high"], *high) << np.uint8(bits)
    if bits == 8:
        codes ^= 0x80  # signed
    d = parts["d"].view("<f2")[:, 0]
    dmin = parts["dmin"].view("<f2")[:, 0] if "dmin" in parts else np.zeros_like(d)
    if grid.scales is None:
        ones = np.ones((len(data), 1), np.int16)
        return Blocks(d, dmin, ones, ones * (0 if grid.mins is None else -1), codes)
    scales, mins = _scales(grid, parts["scales"])
    return Blocks(d, dmin, scales, mins, codes)


def encode(grid: Grid, blocks: Blocks) -> Bytes:
    """Put blocks together: uint8 [blocks, block_bytes]; the inverse of `decode`."""
    (bits, stride), high = _CODES[grid.name]
    codes = blocks.codes ^ np.uint8(0x80) if bits == 8 else blocks.codes
    parts = {
        "d": np.ascontiguousarray(blocks.d.astype("<f2")).view(np.uint8).reshape(-1, 2),
        "dmin": np.ascontiguousarray(blocks.dmin.astype("<f2")).view(np.uint8).reshape(-1, 2),
        "low": _pack(codes & (2**bits - 1), bits, stride),
    }
    if high is not None:
        parts["high"] = _pack(codes >> np.uint8(bits), *high)
    if grid.scales is not None:
        parts["scales"] = _scale_bytes(grid, blocks)
    return np.concatenate([parts[name] for name, _ in grid.fields], axis=1)


def _unpack(packed: Bytes, bits: int, stride: int) -> Bytes:
    """Parts of bytes as bytes: of each run of `stride` bytes first all lowest parts, then all of the next."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    parts = (packed.reshape(len(packed), -1, 1, stride) >> shifts) & np.uint8(2**bits - 1)
    return np.asarray(parts.reshape(len(packed), -1), np.uint8)


def _pack(parts: Bytes, bits: int, stride: int) -> Bytes:
    """The inverse of `_unpack`."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    shifted = parts.reshape(len(parts), -1, 8 // bits, stride) << shifts
    return np.asarray(np.bitwise_or.reduce(shifted, axis=2).reshape(len(parts), -1), np.uint8)


def _scales(grid: Grid, packed: Bytes) -> tuple[Integers, Integers]:
    """Integer scales and mins of blocks, [blocks, block / sub] each."""
    lowest = grid.scales[0] if grid.scales else 0
    if grid.name == "Q2_K":
        return (packed & 15).astype(np.int16), (packed >> 4).astype(np.int16)
    if grid.mins:
        first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
        scales = np.concatenate((first & 63, (third & 15) | (first >> 6 << 4)), axis=1)
        mins = np.concatenate((second & 63, (third >> 4) | (second >> 6 << 4)), axis=1)
        return scales.astype(np.int16), mins.astype(np.int16)
    if grid.name == "Q6_K":
        found = packed.view(np.int8).astype(np.int16)
    elif grid.name == "IQ4_XS":
        found = (_unpack(packed[:, 2:], 4, 1) | (_unpack(packed[:, :2], 2, 1) << 4)).astype(np.int16) + lowest
    else:
        found = (_unpack(packed[:, :8], 4, 8) | (_unpack(packed[:, 8:], 2, 4) << 4)).astype(np.int16) + lowest
    return found, np.zeros_like(found)


def _scale_bytes(grid: Grid, blocks: Blocks) -> Bytes:
    """The inverse of `_scales`."""
    lowest = grid.scales[0] if grid.scales else 0
    if grid.name == "Q6_K":
        return np.ascontiguousarray(blocks.scales.astype(np.int8)).view(np.uint8)
    if grid.mins is None:
        scales = (blocks.scales - lowest).astype(np.uint8)
        low, high = scales & np.uint8(15), scales >> np.uint8(4)
        if grid.name == "IQ4_XS":
            return np.concatenate((_pack(high, 2, 1), _pack(low, 4, 1)), axis=1)
        return np.concatenate((_pack(low, 4, 8), _pack(high, 2, 4)), axis=1)
    scales, mins = blocks.scales.astype(np.uint8), blocks.mins.astype(np.uint8)
    if grid.name == "Q2_K":
        return np.asarray(scales | (mins << 4), np.uint8)
    half = scales.shape[1] // 2
    first = scales[:, :half] | (scales[:, half:] >> 4 << 6)
    second = mins[:, :half] | (mins[:, half:] >> 4 << 6)
    return np.concatenate((first, second, (scales[:, half:] & 15) | (mins[:, half:] << 4)), axis=1)
