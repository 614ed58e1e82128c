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

from quantize.numerics.kernels import kernels_for
from quantize.numerics.rtn import stored_scale
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
        symmetric = without_gil(_symmetric) if kernels is None else kernels.symmetric
        asymmetric = without_gil(_asymmetric) if kernels is None else kernels.asymmetric
        for start in range(0, count, step):
            part = slice(start, start + step)
            tried, important = values[:, part], weights if weights.dim() == 1 else weights[:, part]
            if self.symmetric:
                scales[part] = symmetric(tried, important, self.bits, [*SYMMETRIC_GRID])
                zeros[part] = 2.0 ** (self.bits - 1)
            else:
                found = asymmetric(tried, important, self.bits, float(self.smallest_zero), [*ASYMMETRIC_GRID])
                scales[part], zeros[part] = found
        return scales, zeros


def _symmetric(values: Tensor, weights: Tensor, bits: int, grid: list[float]) -> Tensor:
    """Scales [n]; a pair of candidates of one size and either sign shares its division and rounding."""
    half = 2.0 ** (bits - 1)
    low, high = torch.full_like(values[0], -half), torch.full_like(values[0], half - 1)
    reach = values.abs().amax(0) / half
    exact, error = torch.empty_like(values), torch.empty_like(values)
    scale = stored_scale(reach * (2 * half / (2 * half - 1)))  # the full range of rounding to nearest
    loss = _loss(values, weights, scale, low, high)
    for fraction in grid:
        candidate = stored_scale(reach * fraction)
        torch.mul(values, candidate.reciprocal(), out=exact)
        rounded = exact.round()
        squared = candidate * candidate
        for sign in (1.0, -1.0):
            torch.clamp(rounded, -half if sign > 0 else 1 - half, half - 1 if sign > 0 else half, out=error)
            tried = _summed(error.sub_(exact).square_(), weights).mul_(squared)
            better = tried < loss
            loss = torch.where(better, tried, loss)
            scale = torch.where(better, candidate * sign, scale)
    fitted = _refit(values, weights, scale, low, high)
    return torch.where(_loss(values, weights, fitted, low, high) < loss, fitted, scale)


def _asymmetric(
    values: Tensor, weights: Tensor, bits: int, smallest_zero: float, grid: list[float]
) -> tuple[Tensor, Tensor]:
    """Scales and zero points, [n] each."""
    top = 2.0**bits - 1
    low, high = values.amin(0).clamp_max(0), values.amax(0).clamp_min(0)
    best, scale, zero = torch.full_like(low, float("inf")), torch.ones_like(low), torch.zeros_like(low)
    for fraction in grid:
        candidate = stored_scale((high - low) * (fraction / top))
        point = (low * -fraction / candidate).round().clamp(smallest_zero, top)
        loss = _loss(values, weights, candidate, -point, top - point)
        better = loss < best
        best = torch.where(better, loss, best)
        scale, zero = torch.where(better, candidate, scale), torch.where(better, point, zero)
    first, around = scale, zero
    for shift in (0.0, -1.0, 1.0):
        point = (around + shift).round().clamp(smallest_zero, top)
        candidate = _refit(values, weights, first, -point, top - point)
        loss = _loss(values, weights, candidate, -point, top - point)
        better = loss < best
        best = torch.where(better, loss, best)
        scale, zero = torch.where(better, candidate, scale), torch.where(better, point, zero)
    return scale, zero


def _summed(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of each column, [n]."""
    return torch.mv(values.t(), weights) if weights.dim() == 1 else torch.linalg.vecdot(values, weights, dim=0)


def _loss(values: Tensor, weights: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Squared error of each column, weighted; low and high: the limits of codes less zero point, [n]."""
    exact = values * scale.reciprocal()
    error = torch.clamp(exact.round(), low, high).sub_(exact)
    return _summed(error.square_(), weights).mul_(scale * scale)


def _refit(values: Tensor, weights: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The least-squares scale for the codes that a scale gives; the scale itself where there is none."""
    steps = torch.clamp((values * scale.reciprocal()).round_(), low, high)
    below = _summed(steps * steps, weights)
    fitted = _summed(steps.mul_(values), weights) / below
    return stored_scale(torch.where(torch.isfinite(fitted) & (below > 0), fitted, scale))
