"""The loops of small operations in solvers, as plain torch: GPTQ's columns, and the candidates of the clip search.

In: what gptq and scales prepare. Out: codes and errors, scales and zero points. They run on every device, and are the
reference for the kernels that may stand in for them on a GPU (kernels).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.numerics.rtn import stored_scale


def round_block(steps: Tensor, exact: Tensor, errors: Tensor, feedback: Tensor, low: Tensor, high: Tensor) -> None:
    """Round a block's columns in turn, in units of the scale: `steps` in place; fills `errors` (exact - rounded)."""
    earlier = feedback.t().contiguous()
    for column in range(steps.shape[0]):
        step = steps[column]
        if column > 0:
            step.addmv_(errors[:column].t(), earlier[column, :column])
        torch.clamp(step.round_(), low, high, out=step)
        torch.sub(exact[column], step, out=errors[column])


def symmetric(values: Tensor, weights: Tensor, bits: int, grid: list[float]) -> Tensor:
    """Scales [n]; a pair of candidates of one size and either sign shares its division and rounding."""
    half = 2.0 ** (bits - 1)
    low, high = torch.full_like(values[0], -half), torch.full_like(values[0], half - 1)
    reach = values.abs().amax(0) / half
    exact, error = torch.empty_like(values), torch.empty_like(values)
    scale = stored_scale(reach * (2 * half / (2 * half - 1)))  # the full range of rounding to nearest
    loss = weighted_error(values, weights, scale, low, high)
    for fraction in grid:
        candidate = stored_scale(reach * fraction)
        torch.mul(values, candidate.reciprocal(), out=exact)
        rounded = exact.round()
        squared = candidate * candidate
        for sign in (1.0, -1.0):
            torch.clamp(rounded, -half if sign > 0 else 1 - half, half - 1 if sign > 0 else half, out=error)
            tried = weighted_sum(error.sub_(exact).square_(), weights).mul_(squared)
            better = tried < loss
            loss = torch.where(better, tried, loss)
            scale = torch.where(better, candidate * sign, scale)
    fitted = refit(values, weights, scale, low, high)
    return torch.where(weighted_error(values, weights, fitted, low, high) < loss, fitted, scale)


def asymmetric(
    values: Tensor, weights: Tensor, bits: int, smallest_zero: float, grid: list[float]
) -> tuple[Tensor, Tensor]:
    """Scales and zero points, [n] each."""
    top = 2.0**bits - 1
    low, high = values.amin(0).clamp_max(0), values.amax(0).clamp_min(0)
    best, scale, zero = torch.full_like(low, float("inf")), torch.ones_like(low), torch.zeros_like(low)
    for fraction in grid:
        candidate = stored_scale((high - low) * (fraction / top))
        point = (low * -fraction / candidate).round().clamp(smallest_zero, top)
        loss = weighted_error(values, weights, candidate, -point, top - point)
        better = loss < best
        best = torch.where(better, loss, best)
        scale, zero = torch.where(better, candidate, scale), torch.where(better, point, zero)
    first, around = scale, zero
    for shift in (0.0, -1.0, 1.0):
        point = (around + shift).round().clamp(smallest_zero, top)
        candidate = refit(values, weights, first, -point, top - point)
        loss = weighted_error(values, weights, candidate, -point, top - point)
        better = loss < best
        best = torch.where(better, loss, best)
        scale, zero = torch.where(better, candidate, scale), torch.where(better, point, zero)
    return scale, zero


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of each column, [n]."""
    return torch.mv(values.t(), weights) if weights.dim() == 1 else torch.linalg.vecdot(values, weights, dim=0)


def weighted_error(values: Tensor, weights: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Squared error of each column, weighted; low and high: the limits of codes less zero point, [n]."""
    exact = values * scale.reciprocal()
    error = torch.clamp(exact.round(), low, high).sub_(exact)
    return weighted_sum(error.square_(), weights).mul_(scale * scale)


def refit(values: Tensor, weights: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The least-squares scale for the codes that a scale gives; the scale itself where there is none."""
    steps = torch.clamp((values * scale.reciprocal()).round_(), low, high)
    below = weighted_sum(steps * steps, weights)
    fitted = weighted_sum(steps.mul_(values), weights) / below
    return stored_scale(torch.where(torch.isfinite(fitted) & (below > 0), fitted, scale))
