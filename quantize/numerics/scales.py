"""The clip search: which scale (and zero point) of a group loses least, with a weight on each input channel.

In: values, one group along the first axis; channel weights (diag G). Out: scales as float16 stores them, zero points.
Left to others: what the values are (weights in awq, weights corrected by earlier errors in gptq).
Candidates shrink the full range step by step; the winner is then refitted in closed form to the codes that it gave.
A symmetric scale may be negative: codes reach one further below zero than above it, so its sign chooses which side of
the range gets the extra level (as llama.cpp's Q4_0 does).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.numerics.rtn import stored_scale

SYMMETRIC_GRID = tuple(step / 20 for step in range(22, 11, -1))  # of max |w| / 2**(bits - 1)
ASYMMETRIC_GRID = tuple(step / 20 for step in range(20, 9, -1))  # of (max - min) / (2**bits - 1)
_CHUNK, _CUDA_CHUNK = 2**17, 2**25  # values searched at a time: what caches hold, what fills a GPU


@dataclass(frozen=True)
class ScaleSearch:
    """A clip search for one kind of codes. smallest_zero: 1 where a format can't store a zero point of 0."""

    bits: int
    symmetric: bool
    smallest_zero: int = 0

    def best(self, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and zero point of each column that lose least.

        values: float32 [group_size, n]. weights: float32 [group_size] or [group_size, n], not negative.
        Returns float32 [n] scales (float16 values, never 0) and float32 [n] zero points (whole numbers).
        """
        size, count = values.shape
        scales, zeros = values.new_empty(count), values.new_empty(count)
        step = max(1, (_CUDA_CHUNK if values.is_cuda else _CHUNK) // size)
        for start in range(0, count, step):
            part = slice(start, start + step)
            heavy = weights[:, None] if weights.dim() == 1 else weights[:, part]
            state = _Columns(values[:, part], heavy, self)
            scales[part], zeros[part] = state.symmetric() if self.symmetric else state.asymmetric()
        return scales, zeros


class _Columns:
    """Some columns under search: the best candidate so far and two buffers."""

    def __init__(self, values: Tensor, weights: Tensor, kind: ScaleSearch) -> None:
        self._values, self._weights, self._kind = values, weights, kind
        self._top = float(2**kind.bits - 1)
        self._error, self._steps = torch.empty_like(values), torch.empty_like(values)
        self._loss = values.new_full(values.shape[1:], float("inf"))
        self._scale, self._zero = torch.ones_like(self._loss), torch.zeros_like(self._loss)

    def symmetric(self) -> tuple[Tensor, Tensor]:
        half = 2.0 ** (self._kind.bits - 1)
        reach = self._values.abs().amax(0) / half
        zero = torch.full_like(reach, half)
        self._try(stored_scale(reach * (2 * half / self._top)), zero)  # the full range of rounding to nearest
        for fraction in SYMMETRIC_GRID:
            self._try(stored_scale(reach * fraction), zero)
            self._try(stored_scale(reach * -fraction), zero)
        self._try(self._refit(self._scale, self._zero), zero)
        return self._scale, self._zero

    def asymmetric(self) -> tuple[Tensor, Tensor]:
        low, high = self._values.amin(0).clamp_max(0), self._values.amax(0).clamp_min(0)
        for fraction in ASYMMETRIC_GRID:
            scale = stored_scale((high - low) * (fraction / self._top))
            self._try(scale, self._whole(low * -fraction / scale))
        scale, zero = self._scale.clone(), self._zero.clone()
        for shift in (0, -1, 1):
            shifted = self._whole(zero + shift)
            self._try(self._refit(scale, shifted), shifted)
        return self._scale, self._zero

    def _whole(self, zero: Tensor) -> Tensor:
        return zero.round().clamp_(self._kind.smallest_zero, self._top)

    def _encode(self, scale: Tensor, zero: Tensor) -> None:
        """Exact steps from zero into _error, rounded and clipped ones into _steps."""
        torch.mul(self._values, scale.reciprocal(), out=self._error)
        torch.round(self._error, out=self._steps)
        if self._kind.symmetric:
            half = 2 ** (self._kind.bits - 1)
            self._steps.clamp_(-half, half - 1)
        else:
            self._steps.clamp_(-zero, self._top - zero)

    def _try(self, scale: Tensor, zero: Tensor) -> None:
        self._encode(scale, zero)
        error = self._error.sub_(self._steps)
        loss = error.square_().mul_(self._weights).sum(0).mul_(scale * scale)
        better = loss < self._loss
        self._loss = torch.where(better, loss, self._loss)
        self._scale = torch.where(better, scale, self._scale)
        self._zero = torch.where(better, zero, self._zero)

    def _refit(self, scale: Tensor, zero: Tensor) -> Tensor:
        """The least-squares scale for the codes that (scale, zero) give."""
        self._encode(scale, zero)
        heavy = self._error.copy_(self._steps).mul_(self._weights)
        below = (heavy * self._steps).sum(0)
        fitted = heavy.mul_(self._values).sum(0) / below
        return stored_scale(torch.where(torch.isfinite(fitted) & (below > 0), fitted, scale))
