"""GPTQ from a Gram matrix: rounding with error feedback, so that W X stays close, not W.

In: weights [out, in] that share one input, and that input's Gram matrix. Out: Quantized, and the loss it leaves.
Left to others: the statistics (gram), channel scales (awq), packing. Method: Frantar et al. 2022 (GPTQ) in the LDL form
of Chee et al. 2023 (QuIP, which proves the two equal): H = R Rᵀ with R upper triangular gives the feedback directly,
with one Cholesky factorization and no inverse. Columns are visited in an order by diag H that keeps groups whole
(groups first, then columns within them), so codes are stored in the original order and inference pays nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantize.errors import BuildError
from quantize.numerics import loops
from quantize.numerics.constants import GPU_SOLVED_VALUES, SOLVED_ROWS
from quantize.numerics.kernels import kernels_for
from quantize.numerics.rtn import Quantized, check_shape, round_to_nearest
from quantize.numerics.scales import ScaleSearch
from quantize.system.threads import without_gil

DAMPING = 0.01
SMALLEST_ZERO = 1  # GPTQ v1 stores zero points less one
REPORT_ROWS = 128
LOSS_PANELS = 4
_BLOCK = 64  # columns between two products with all earlier errors


@dataclass(frozen=True)
class Factor:
    """What depends on the input alone; shared by every linear, bit width and variant that reads it.

    gram: [in, in] float32, as given. order: int64 [in], visiting order. feedback: unit upper triangular [in, in] in
    that order. weights: float32 [in], diag of the Gram matrix with damping, in that order.
    damping: the fraction of the mean diagonal that was added; above what was asked for if that did not factorize.
    """

    gram: Tensor
    order: Tensor
    feedback: Tensor
    weights: Tensor
    damping: float
    group_size: int


@dataclass(frozen=True)
class Solution:
    """One quantized linear. Losses are tr(ΔW G ΔWᵀ): squared output error summed over outputs and calibration tokens.

    loss: what is left. nearest_loss: what rounding to nearest would have left. fallback_rows: output rows for which
    rounding to nearest was better and was taken.
    """

    quantized: Quantized
    loss: float
    nearest_loss: float
    fallback_rows: int


def factorize(gram: Tensor, group_size: int, *, damping: float = DAMPING, order: Tensor | None = None) -> Factor:
    """Order the columns and factorize the damped Gram matrix; damping rises tenfold until it is positive definite.

    gram: [in, in] float32, symmetric. order: int64 [in], how columns are visited; None for `group_order`.

    Raises:
        BuildError: it is not finite, or the group size does not divide its width.
    """
    check_shape(gram.shape[0], 4, group_size)
    diagonal = gram.diagonal()
    mean = float(diagonal.double().mean())
    if not math.isfinite(mean):
        raise BuildError("the Gram matrix is not finite", hint="the model overflows on the calibration text")
    order = group_order(diagonal, group_size) if order is None else order
    backward = order.flip(0)
    while mean > 0 and damping < 1e3:
        matrix = gram.index_select(0, backward).index_select(1, backward)
        matrix.diagonal().add_(damping * mean)
        weights = matrix.diagonal().flip(0)
        lower, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0:
            upper = lower.flip(0, 1)
            return Factor(gram, order, upper.div_(upper.diagonal().clone()), weights, damping, group_size)
        damping = max(damping * 10, 1e-4)
    identity = torch.eye(gram.shape[0], device=gram.device)  # no data: rounding to nearest
    return Factor(gram, order, identity, torch.ones_like(diagonal), float("inf"), group_size)


def group_order(diagonal: Tensor, group_size: int) -> Tensor:
    """Groups by falling sum of the diagonal, columns by falling diagonal inside each; int64 [in]."""
    groups = diagonal.view(-1, group_size)
    outer = torch.argsort(groups.sum(1), descending=True, stable=True)
    inner = torch.argsort(groups, dim=1, descending=True, stable=True)
    return (outer[:, None] * group_size + inner[outer]).reshape(-1)


def solve(
    weights: Sequence[Tensor],
    factor: Factor,
    *,
    bits: int,
    symmetric: bool = True,
    smallest_zero: int = SMALLEST_ZERO,
) -> list[Solution]:
    """Quantize linears that share one input.

    weights: each [out, in] floating. smallest_zero: 1 for GPTQ v1, which can't store a zero point of 0. No output row
    is worse under the undamped Gram matrix than rounded to nearest.

    Raises:
        BuildError: bits not supported.
    """
    tasks = row_tasks(weights, factor, bits=bits, symmetric=symmetric, smallest_zero=smallest_zero)
    return collect(weights, [task() for task in tasks])


def row_tasks(
    weights: Sequence[Tensor],
    factor: Factor,
    *,
    bits: int,
    symmetric: bool = True,
    smallest_zero: int = SMALLEST_ZERO,
) -> list[Callable[[], SolvedRows]]:
    """As `solve`, in pieces that may run in any order, or at once; `collect` puts their results together."""
    stacked = torch.cat([weight.float() for weight in weights]) if len(weights) > 1 else weights[0].float()
    check_shape(stacked.shape[1], bits, factor.group_size)
    kind = ScaleSearch(bits, symmetric, smallest_zero)
    step = max(SOLVED_ROWS, GPU_SOLVED_VALUES // stacked.shape[1]) if stacked.is_cuda else SOLVED_ROWS
    starts = range(0, len(stacked), step)
    return [partial(_solve_rows, stacked[start : start + step], factor, kind) for start in starts]


def collect(weights: Sequence[Tensor], parts: Sequence[SolvedRows]) -> list[Solution]:
    """The results of all of `row_tasks`, in order, as one solution for each weight."""
    sizes = [weight.shape[0] for weight in weights]
    solved = _concatenate([part.quantized for part in parts])
    figures = torch.cat([part.figures for part in parts], dim=1).cpu().double()
    solutions: list[Solution] = []
    start = 0
    for quantized, size in zip(solved.split(sizes), sizes, strict=True):
        loss, nearest, fallback = figures[:, start : start + size].sum(1).tolist()
        solutions.append(Solution(quantized, loss, nearest, int(fallback)))
        start += size
    return solutions


@dataclass(frozen=True)
class SolvedRows:
    """Some output rows. figures: float32 [3, rows]: loss, loss of rounding to nearest, 1 where that was taken."""

    quantized: Quantized
    figures: Tensor


def _solve_rows(rows: Tensor, factor: Factor, kind: ScaleSearch) -> SolvedRows:
    solved = _sweep(rows, factor, kind)
    nearest = _nearest(rows, factor, kind)
    loss = row_losses(solved.dequantize() - rows, factor.gram)
    bound = row_losses(nearest.dequantize() - rows, factor.gram)
    worse = loss > bound
    if bool(worse.any()):
        solved = _merge(solved, nearest, worse)
    return SolvedRows(solved, torch.stack((torch.minimum(loss, bound), bound, worse.float())))


def row_losses(error: Tensor, gram: Tensor) -> Tensor:
    """diag(E G Eᵀ): each output row's squared error summed over the calibration tokens, float32 [out].

    gram is symmetric: on a CPU a panel of it counts once for what is above the diagonal, and twice in the sum.
    """
    width = gram.shape[0]
    panel = width if gram.is_cuda else max(128, -(-width // LOSS_PANELS))
    losses = error.new_zeros(error.shape[0])
    for start in range(0, width, panel):
        part = slice(start, start + panel)
        product = error[:, part] @ gram[part, part]
        if start:
            product.addmm_(error[:, :start], gram[:start, part], alpha=2)
        losses += torch.linalg.vecdot(product, error[:, part])
    return losses


def estimated_loss(error: Tensor, gram: Tensor) -> float:
    """tr(E G Eᵀ) from every n-th output row, at most REPORT_ROWS of them: close enough for reports, cheap when wide."""
    stride = -(-error.shape[0] // REPORT_ROWS)
    rows = error[::stride].float()
    return float(row_losses(rows, gram).double().sum()) * error.shape[0] / rows.shape[0]


def _sweep(weight: Tensor, factor: Factor, search: ScaleSearch) -> Quantized:
    """Round column after column, feeding each error forward; everything is held transposed, [in, out]."""
    group_size, order, feedback = factor.group_size, factor.order, factor.feedback
    original = weight.T.contiguous().index_select(0, order)
    width, out = original.shape
    errors = torch.empty_like(original)
    codes = torch.empty(width, out, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(width // group_size, out, device=weight.device)  # in visiting order, as codes
    zeros = torch.empty_like(scales)
    kernels = kernels_for(weight)
    round_block = without_gil(loops.round_block) if kernels is None else kernels.round_block
    for place in range(width // group_size):
        start, stop = place * group_size, (place + 1) * group_size
        target = original[start:stop].clone()
        if start:
            target.addmm_(feedback[:start, start:stop].T, errors[:start])
        scale, zero = search.best(target, factor.weights[start:stop])
        scales[place], zeros[place] = scale, zero
        inverse, low, high = scale.reciprocal(), -zero, (2**search.bits - 1) - zero
        steps, exact, wrong = target.mul_(inverse), original[start:stop] * inverse, errors[start:stop]
        for first in range(0, group_size, _BLOCK):
            last = min(first + _BLOCK, group_size)
            inner = feedback[start + first : start + last, start + first : start + last]
            if first:
                between = feedback[start : start + first, start + first : start + last]
                steps[first:last].addmm_(between.T, wrong[:first])
            round_block(steps[first:last], exact[first:last], wrong[first:last], inner, low, high)
        wrong.mul_(scale)
        codes[start:stop] = steps.add_(zero)
    groups = order[::group_size] // group_size

    def stored(visited: Tensor, places: Tensor) -> Tensor:
        return torch.empty_like(visited).index_copy_(0, places, visited).T.contiguous()

    scales, zeros = stored(scales.half(), groups), stored(zeros.to(torch.uint8), groups)
    return Quantized(stored(codes, order), scales, zeros, search.bits, group_size)


def _nearest(rows: Tensor, factor: Factor, kind: ScaleSearch) -> Quantized:
    size, zero = factor.group_size, kind.smallest_zero
    return round_to_nearest(rows, bits=kind.bits, group_size=size, symmetric=kind.symmetric, smallest_zero=zero)


def _merge(solved: Quantized, nearest: Quantized, take_nearest: Tensor) -> Quantized:
    pick = take_nearest[:, None]
    return Quantized(
        torch.where(pick, nearest.codes, solved.codes),
        torch.where(pick, nearest.scales, solved.scales),
        torch.where(pick, nearest.zeros, solved.zeros),
        solved.bits,
        solved.group_size,
    )


def _concatenate(parts: Sequence[Quantized]) -> Quantized:
    if len(parts) == 1:
        return parts[0]
    codes, scales, zeros = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales", "zeros"))
    return Quantized(codes, scales, zeros, parts[0].bits, parts[0].group_size)
