"""The Triton kernels behind numerics/kernels.py: what their plain counterparts do, a tile of output rows at a time.

In: as the plain functions, on a GPU (or on the CPU under TRITON_INTERPRET=1, which is how they are tested). Out: the
same; sums are added in another order, so a near tie may fall the other way. Divisions are those of IEEE, no product is
fused with a sum, and clamping to whole limits comes before rounding, which gives the same number.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantize.numerics.kernels import Kernels

TILE = 32  # output rows, or columns of a search, of one program: with 128 of a group they fit its registers
_EXACT: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _nearest(value):
    """The nearest whole number, ties to even; |value| < 2**22."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def _stored(scale):
    """See rtn.stored_scale."""
    rounded = tl.minimum(tl.maximum(scale, -65504.0), 65504.0).to(tl.float16).to(tl.float32)
    return tl.where(rounded == 0.0, 5.9604644775390625e-08, rounded)


@triton.jit
def _error(values, weights, scale, low, high):
    """See loops.weighted_error."""
    exact = values * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[None, :]
    wrong = _nearest(tl.minimum(tl.maximum(exact, low[None, :]), high[None, :])) - exact
    return tl.sum(wrong * wrong * weights, 0) * (scale * scale)


@triton.jit
def _fitted(values, weights, scale, low, high):
    """See loops.refit."""
    exact = values * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[None, :]
    steps = _nearest(tl.minimum(tl.maximum(exact, low[None, :]), high[None, :]))
    below = tl.sum(steps * steps * weights, 0)
    some = below > 0.0
    fitted = tl.div_rn(tl.sum(steps * values * weights, 0), tl.where(some, below, 1.0))
    finite = tl.abs(fitted) < float("inf")
    return _stored(tl.where(some & finite, fitted, scale))


@triton.jit
def _read(
    values, weights, size, count, row_stride, weight_rows, weight_columns, SIZE: tl.constexpr, TILE: tl.constexpr
):
    """A tile of columns and of their channels' weights; what is past the end is 0."""
    rows, columns = tl.arange(0, SIZE), tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = (rows < size)[:, None] & (columns < count)[None, :]
    found = tl.load(values + rows[:, None].to(tl.int64) * row_stride + columns[None, :], mask=inside, other=0.0)
    places = rows[:, None].to(tl.int64) * weight_rows + columns[None, :] * weight_columns
    return found, tl.load(weights + places, mask=inside, other=0.0), columns


@triton.jit
def _symmetric_kernel(
    values, weights, scales, size, count, row_stride, weight_rows, weight_columns, half, reach_share,
    GRID: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    found, importance, columns = _read(
        values, weights, size, count, row_stride, weight_rows, weight_columns, SIZE, TILE
    )
    reach = tl.div_rn(tl.max(tl.abs(found), 0), tl.full([TILE], 1.0, tl.float32) * half)
    low, high = tl.full([TILE], 0.0, tl.float32) - half, tl.full([TILE], -1.0, tl.float32) + half
    scale = _stored(reach * reach_share)
    loss = _error(found, importance, scale, low, high)
    for number in tl.static_range(len(GRID)):
        candidate = _stored(reach * GRID[number])
        for turned in tl.static_range(2):
            tried = _error(found, importance, candidate, low + turned, high + turned)
            better = tried < loss
            loss = tl.where(better, tried, loss)
            scale = tl.where(better, candidate * (1.0 - 2.0 * turned), scale)
    refit = _fitted(found, importance, scale, low, high)
    better = _error(found, importance, refit, low, high) < loss
    tl.store(scales + columns, tl.where(better, refit, scale), mask=columns < count)


@triton.jit
def _asymmetric_kernel(
    values, weights, scales, zeros, size, count, row_stride, weight_rows, weight_columns, top, smallest,
    GRID: tl.constexpr, SHARES: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    found, importance, columns = _read(
        values, weights, size, count, row_stride, weight_rows, weight_columns, SIZE, TILE
    )
    low, high = tl.minimum(tl.min(found, 0), 0.0), tl.maximum(tl.max(found, 0), 0.0)
    best = tl.full([TILE], float("inf"), tl.float32)
    scale, zero = tl.full([TILE], 1.0, tl.float32), tl.full([TILE], 0.0, tl.float32)
    for number in tl.static_range(len(GRID)):
        candidate = _stored((high - low) * SHARES[number])
        point = _nearest(tl.minimum(tl.maximum(tl.div_rn(low * -GRID[number], candidate), smallest), top))
        loss = _error(found, importance, candidate, -point, top - point)
        better = loss < best
        best = tl.where(better, loss, best)
        scale, zero = tl.where(better, candidate, scale), tl.where(better, point, zero)
    first, around = scale, zero
    for number in tl.static_range(3):
        shift = -1.0 if number == 1 else (1.0 if number == 2 else 0.0)
        point = tl.minimum(tl.maximum(around + shift, smallest), top)
        candidate = _fitted(found, importance, first, -point, top - point)
        loss = _error(found, importance, candidate, -point, top - point)
        better = loss < best
        best = tl.where(better, loss, best)
        scale, zero = tl.where(better, candidate, scale), tl.where(better, point, zero)
    tl.store(scales + columns, scale, mask=columns < count)
    tl.store(zeros + columns, zero, mask=columns < count)


@triton.jit
def _round_kernel(
    steps, exact, errors, feedback, low, high, size, count, step_stride, exact_stride, error_stride, feedback_stride,
    SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.arange(0, SIZE), tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = columns < count
    inside = (rows < size)[:, None] & there[None, :]
    left = tl.load(steps + rows[:, None].to(tl.int64) * step_stride + columns[None, :], mask=inside, other=0.0)
    least, most = tl.load(low + columns, mask=there, other=0.0), tl.load(high + columns, mask=there, other=0.0)
    for row in range(size):
        mine = tl.sum(tl.where((rows == row)[:, None], left, 0.0), 0)
        code = _nearest(tl.minimum(tl.maximum(mine, least), most))
        wrong = tl.load(exact + row * exact_stride + columns, mask=there, other=0.0) - code
        tl.store(steps + row * step_stride + columns, code, mask=there)
        tl.store(errors + row * error_stride + columns, wrong, mask=there)
        later = tl.load(feedback + row * feedback_stride + rows, mask=(rows > row) & (rows < size), other=0.0)
        left += later[:, None] * wrong[None, :]


def round_block(steps: Tensor, exact: Tensor, errors: Tensor, feedback: Tensor, low: Tensor, high: Tensor) -> None:
    """See loops.round_block; each [columns, out] tensor has rows without gaps."""
    size, count = steps.shape
    assert all(tensor.stride(1) == 1 for tensor in (steps, exact, errors, feedback))
    _round_kernel[(triton.cdiv(count, TILE),)](
        steps, exact, errors, feedback, low.contiguous(), high.contiguous(), size, count,
        steps.stride(0), exact.stride(0), errors.stride(0), feedback.stride(0),
        SIZE=triton.next_power_of_2(size), TILE=TILE, **_EXACT,
    )  # fmt: skip


def symmetric(values: Tensor, weights: Tensor, bits: int, grid: list[float]) -> Tensor:
    """See loops.symmetric."""
    half, scales = 2.0 ** (bits - 1), torch.empty_like(values[0])
    _symmetric_kernel[(triton.cdiv(values.shape[1], TILE),)](
        *_placed(values, weights, scales), half, 2 * half / (2 * half - 1),
        GRID=tuple(grid), SIZE=triton.next_power_of_2(values.shape[0]), TILE=TILE, **_EXACT,
    )  # fmt: skip
    return scales


def asymmetric(
    values: Tensor, weights: Tensor, bits: int, smallest_zero: float, grid: list[float]
) -> tuple[Tensor, Tensor]:
    """See loops.asymmetric."""
    top, scales, zeros = 2.0**bits - 1, torch.empty_like(values[0]), torch.empty_like(values[0])
    _asymmetric_kernel[(triton.cdiv(values.shape[1], TILE),)](
        *_placed(values, weights, scales, zeros), top, smallest_zero, GRID=tuple(grid),
        SHARES=tuple(fraction / top for fraction in grid), SIZE=triton.next_power_of_2(values.shape[0]), TILE=TILE,
        **_EXACT,
    )  # fmt: skip
    return scales, zeros


def _placed(values: Tensor, weights: Tensor, *results: Tensor) -> tuple[Any, ...]:
    """Arguments that say where everything is. weights: [group_size], or [group_size, n] for each column its own."""
    assert values.stride(1) == 1
    own = weights.stride(1) if weights.dim() == 2 else 0
    return values, weights, *results, *values.shape, values.stride(0), weights.stride(0), own


KERNELS = Kernels(f"triton {triton.__version__}", round_block, symmetric, asymmetric)
