"""The loops of small operations for a GPU without Triton: what loops does, in as few launches as plain torch allows.

In, out: as loops has them, which stays the reference. A GPU takes as long for a small operation as for a large one, so
candidates are tried all at once, and a column takes three launches: its errors are its exact values less its codes, and
what the exact values add to later columns is known before the first one is rounded. Sums are added in another order
than there, so a near tie may fall the other way.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from quantize.numerics.loops import refit, weighted_error, weighted_sum
from quantize.numerics.rtn import stored_scale

TRIED_VALUES = 2**25  # of all candidates at once, of which there are a few copies


def round_block(steps: Tensor, exact: Tensor, errors: Tensor, feedback: Tensor, low: Tensor, high: Tensor) -> None:
    """See loops.round_block."""
    later = feedback.triu(1)
    steps.addmm_(later.t(), exact)
    codes = torch.zeros_like(steps)
    earlier, rounded = later.t().neg(), codes.t()
    for step, less, code in zip(steps.unbind(0), earlier.unbind(0), codes.unbind(0), strict=True):
        torch.clamp(step.addmv_(rounded, less).round_(), low, high, out=code)
    torch.sub(exact, codes, out=errors)
    steps.copy_(codes)


def symmetric(values: Tensor, weights: Tensor, bits: int, grid: list[float]) -> Tensor:
    """See loops.symmetric."""
    step = max(1, TRIED_VALUES // (len(grid) + 1) // values.shape[0])
    parts = []
    for start in range(0, values.shape[1], step):
        part = slice(start, start + step)
        parts.append(_symmetric(values[:, part], weights if weights.dim() == 1 else weights[:, part], bits, grid))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _symmetric(values: Tensor, weights: Tensor, bits: int, grid: list[float]) -> Tensor:
    half = 2.0 ** (bits - 1)
    nearest = 2 * half / (2 * half - 1)  # the full range, as rounding to nearest has it
    fractions = torch.tensor([nearest, *grid], device=values.device)[:, None]
    candidates = stored_scale(values.abs().amax(0) / half * fractions)
    exact = values[:, None] * candidates.reciprocal()
    rounded, squared = exact.round(), candidates.square()

    def losses(least: float, most: float, first: int) -> Tensor:
        error = mse_loss(torch.clamp(rounded[:, first:], least, most), exact[:, first:], reduction="none")
        if weights.dim() == 1:
            return weighted_sum(error.flatten(1), weights).view_as(squared[first:]).mul_(squared[first:])
        return error.mul_(weights[:, None]).sum(0).mul_(squared[first:])

    up, down = losses(-half, half - 1, 0), losses(1 - half, half, 1)
    loss, place = torch.cat((up[:1], torch.stack((up[1:], down), 1).flatten(0, 1))).min(0)  # in the order of loops
    turned = torch.stack((candidates[1:], -candidates[1:]), 1).flatten(0, 1)
    scale = torch.cat((candidates[:1], turned)).gather(0, place[None])[0]
    low, high = torch.full_like(scale, -half), torch.full_like(scale, half - 1)
    fitted = refit(values, weights, scale, low, high)
    return torch.where(weighted_error(values, weights, fitted, low, high) < loss, fitted, scale)
