"""Group-wise uniform quantization: codes, scales, zero points, and rounding to nearest.

In: weights [out, in]. Out: Quantized, or the scales that lose least. Left to others: error compensation (gptq), channel
scales (awq), bytes on disk (packing). Scales are float16 as stored, so dequantize() is exactly what an artifact holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.errors import BuildError

BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Quantized:
    """A quantized weight: w[o, i] = (codes[o, i] - zeros[o, i // group_size]) * scales[o, i // group_size].

    codes: uint8 [out, in], below 2**bits. scales: float16 [out, in / group_size]; may be negative.
    zeros: uint8 [out, in / group_size]; 2**(bits - 1) throughout for symmetric quantization.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, float32 [out, in]; the product of a code and a scale is exact."""
        rows, width = self.codes.shape
        steps = self.codes.view(rows, -1, self.group_size).float() - self.zeros.float()[..., None]
        return (steps * self.scales.float()[..., None]).view(rows, width)

    def rows(self, start: int, stop: int) -> Quantized:
        """Output rows [start, stop)."""
        return Quantized(
            self.codes[start:stop], self.scales[start:stop], self.zeros[start:stop], self.bits, self.group_size
        )

    def split(self, sizes: Sequence[int]) -> tuple[Quantized, ...]:
        """One Quantized for each run of output rows, of the given sizes."""
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        return tuple(self.rows(start, start + size) for start, size in zip(starts, sizes, strict=True))


def check_shape(width: int, bits: int, group_size: int) -> None:
    """Refuse bits and group sizes that can't be.

    Raises:
        BuildError: bits not in BITS, or a group size that does not divide the input width.
    """
    if bits not in BITS:
        raise BuildError(f"{bits} bits are not supported", hint=f"use one of {', '.join(map(str, BITS))}")
    if group_size < 1 or width % group_size:
        fits = [size for size in (16, 32, 64, 128, 256) if width % size == 0]
        raise BuildError(
            f"group size {group_size} does not divide an input width of {width}",
            hint=f"sizes that do: {', '.join(map(str, fits)) or width}",
        )


def stored_scale(scale: Tensor) -> Tensor:
    """Round scales to float16 as they are stored, in float32; zero becomes the smallest positive float16."""
    rounded = scale.clamp(-65504, 65504).half().float()
    return torch.where(rounded == 0, torch.full_like(rounded, 2.0**-24), rounded)


def code_limits(bits: int, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest code after the zero point is taken off, shaped as `zeros` (float32)."""
    return -zeros, (2**bits - 1) - zeros


def full_range(groups: Tensor, bits: int, *, symmetric: bool, smallest_zero: int = 0) -> tuple[Tensor, Tensor]:
    """Scales and zero points that cover each group's range (no clipping).

    groups: [..., group_size]. smallest_zero: 1 where a format can't store a zero point of 0.
    Returns float32 scales (float16 values) and zero points, [...].
    """
    top = 2**bits - 1
    if symmetric:
        scale = stored_scale(groups.abs().amax(-1) * (2 / top))
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scale = stored_scale((high - low) / top)
    zero = (-low / scale).round_().clamp_(0, top)
    if smallest_zero > 0:
        short = zero < smallest_zero
        scale = torch.where(short, stored_scale(high / (top - smallest_zero)), scale)
        zero = torch.where(short, torch.full_like(zero, smallest_zero), zero)
    return scale, zero


def round_to_nearest(
    weight: Tensor, *, bits: int, group_size: int, symmetric: bool, smallest_zero: int = 0
) -> Quantized:
    """Round each group of `group_size` weights along the input to the nearest of 2**bits levels over its full range.

    weight: [out, in] floating. Raises BuildError as check_shape does.
    """
    check_shape(weight.shape[1], bits, group_size)
    groups = weight.float().view(weight.shape[0], -1, group_size)
    scales, zeros = full_range(groups, bits, symmetric=symmetric, smallest_zero=smallest_zero)
    return encode(weight, scales, zeros, bits=bits, group_size=group_size)


def encode(weight: Tensor, scales: Tensor, zeros: Tensor, *, bits: int, group_size: int) -> Quantized:
    """Round to the nearest level of given scales and zero points ([out, in / group_size], scales nonzero float16)."""
    groups = weight.float().view(weight.shape[0], -1, group_size)
    low, high = code_limits(bits, zeros)
    steps = torch.div(groups, scales[..., None]).round_()
    steps = torch.clamp_(steps, low[..., None], high[..., None]).add_(zeros[..., None])
    return Quantized(steps.to(torch.uint8).view_as(weight), scales.half(), zeros.to(torch.uint8), bits, group_size)
