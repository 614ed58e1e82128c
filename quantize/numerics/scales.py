"""The clip search: which scale (and zero point) of a group loses least, with a weight on each input channel.

In: values, one group along the first axis; channel weights (diag G). Out: scales as float16 stores them, zero points.
Left to others: what the values are (weights in awq, weights corrected by earlier errors in gptq).
Candidates shrink the full range step by step; the winner is then refitted in closed form to the codes that it gave.
A symmetric scale may be negative: codes reach one further below zero than above it, so its sign chooses which side of
the range gets the extra level (as llama.cpp's Q4_0 does).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quantize.numerics import loops
from quantize.numerics.kernels import kernels_for
from quantize.system.threads import without_gil

SYMMETRIC_GRID = tuple(step / 100 for step in range(110, 60, -7))  # of max |w| / 2**(bits - 1)
ASYMMETRIC_GRID = tuple(step / 20 for step in range(20, 9, -1))  # of (max - min) / (2**bits - 1)
_CHUNK = 2**17  # values searched at a time: what caches hold
GPU_SEARCHED_VALUES = 2**25  # what fills a GPU


@dataclass(frozen=True)
class ScaleSearch:
    """A clip search for one kind of codes. smallest_zero: 1 where a format can't store a zero point of 0."""

    bits: int
    symmetric: bool
    smallest_zero: int = 0

    def best(self, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and zero point of each column that lose least.

        values: float32 [group_size, n]. weights: float32 [group_size], not negative; [group_size, n] where each column
        has its own.
        Returns float32 [n] scales (float16 values, never 0) and float32 [n] zero points (whole numbers).
        """
        size, count = values.shape
        scales, zeros = values.new_empty(count), values.new_empty(count)
        step = max(1, (GPU_SEARCHED_VALUES if values.is_cuda else _CHUNK) // size)
        kernels = kernels_for(values)
        for start in range(0, count, step):
            part = slice(start, start + step)
            tried, important = values[:, part], weights if weights.dim() == 1 else weights[:, part]
            if self.symmetric:
                symmetric = without_gil(loops.symmetric) if kernels is None else kernels.symmetric
                scales[part] = symmetric(tried, important, self.bits, [*SYMMETRIC_GRID])
                zeros[part] = 2.0 ** (self.bits - 1)
            else:
                asymmetric = without_gil(loops.asymmetric) if kernels is None else kernels.asymmetric
                found = asymmetric(tried, important, self.bits, float(self.smallest_zero), [*ASYMMETRIC_GRID])
                scales[part], zeros[part] = found
        return scales, zeros
