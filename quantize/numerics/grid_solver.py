"""Rounding with error feedback into the grids of llama.cpp's types: so that W X stays close, in the same bytes.

In: weights, the factor of their input's Gram matrix, the bytes that llama.cpp rounded them to. Out: bytes of the same
type and size, and what they lose. Left to others: statistics (gram), byte layouts (kquants), files.
Method: GPTQ (Frantar et al. 2022) in the form that gptq.py has it. Blocks keep their place: they are visited by
falling diagonal, sub-blocks likewise inside of them, columns inside of those. As a block is reached, d and dmin are
chosen for its corrected target, llama.cpp's own among the candidates; as a sub-block is reached, its integer scale and
min are fitted once more, and its columns are rounded in turn. In the end each d and dmin is fitted in closed form to
all that was rounded, where that loses less. A row that loses more than llama.cpp's is given back as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from quantize.numerics import grid_loops
from quantize.numerics.gptq import Factor, factorize, row_losses
from quantize.numerics.kquants import Blocks, Grid, decode, encode
from quantize.system.threads import without_gil

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

# The share of the mean diagonal that is added to all of it. It decides how a solution does on text that was not
# calibrated on. Loss under the Gram matrices of such text, llama.cpp's is 1; two blocks of a model of 135M, from 7,000
# tokens: of the same kind 0.39 with 0.01, 0.40 with 0.2; English prose 0.90 and 0.77; another language 1.26 and 0.97.
# Shrinking the matrix towards its diagonal did less.
DAMPING = 0.2
SOLVED_ROWS = 512  # at a time: bounds memory, keeps threads busy; rows don't depend on one another
PLAIN_VALUES = 256  # of blocks without integer scales, between two products with all earlier errors
WIDE_SHARES = (1.1, 1.03, 0.96, 0.89, 0.82, 0.75, 0.68, 0.61, 0.54)  # of the range, for a few levels
SHARES = (1.1, 1.03, 0.96, 0.89, 0.82, 0.75, 0.68)
NARROW_SHARES = (1.02, 1.0, 0.98, 0.95, 0.92, 0.88)  # for many
SPREAD = (1.0, 0.985, 0.97, 0.955, 0.94, 0.91)  # of the largest integer scale, that the largest scale becomes


@dataclass(frozen=True)
class GridRows:
    """Some output rows. data: uint8 [rows, bytes of a row]. figures: float64 [3, rows]: loss, that of the bytes to
    begin with, 1 where those were taken; losses are diag(ΔW G ΔWᵀ), squared output error over the calibration tokens.
    """

    data: Bytes
    figures: NDArray[np.float64]


@dataclass
class _Rounded:
    """Rounded rows, columns first. d, dmin: [blocks, rows]. scales, mins: [sub-blocks, rows]. picked: levels,
    [in, rows]; all float32.
    """

    d: Tensor
    dmin: Tensor
    scales: Tensor
    mins: Tensor
    picked: Tensor


def factor_for(gram: Tensor, grid: Grid, *, damping: float = DAMPING) -> Factor:
    """The factor of an input's Gram matrix in the order in which a type's columns are visited.

    gram: [in, in] float32, symmetric; in is a multiple of the type's block. Raises BuildError: it is not finite.
    """
    return factorize(gram, grid.sub, damping=damping, order=block_order(gram.diagonal(), grid))


def block_order(diagonal: Tensor, grid: Grid) -> Tensor:
    """Blocks by falling sum of the diagonal, sub-blocks likewise in them, columns in those; int64 [in]."""
    values = diagonal.view(-1, grid.block // grid.sub, grid.sub)
    outer = torch.argsort(values.sum((1, 2)), descending=True, stable=True)
    middle = torch.argsort(values.sum(2), dim=1, descending=True, stable=True)
    inner = torch.argsort(values, dim=2, descending=True, stable=True)
    starts = torch.arange(0, len(diagonal), grid.sub, device=diagonal.device).view(values.shape[:2])
    columns = (starts[..., None] + inner).gather(1, middle[..., None].expand_as(inner))
    return columns[outer].reshape(-1)


def row_tasks(weight: Tensor, factor: Factor, grid: Grid, data: Bytes) -> list[Callable[[], GridRows]]:
    """Solve a weight [out, in] in pieces that may run in any order, or at once; `collect` puts them together.

    weight: any floating type, on the factor's device. data: uint8 [out, bytes of a row], llama.cpp's rounding of it.
    """
    starts = range(0, len(weight), SOLVED_ROWS)
    return [
        partial(solve_rows, weight[start : start + SOLVED_ROWS], factor, grid, data[start : start + SOLVED_ROWS])
        for start in starts
    ]


def collect(parts: list[GridRows]) -> GridRows:
    """The results of all of `row_tasks`, in order, as one."""
    return GridRows(
        np.concatenate([part.data for part in parts]), np.concatenate([part.figures for part in parts], axis=1)
    )


def solve_rows(weight: Tensor, factor: Factor, grid: Grid, data: Bytes) -> GridRows:
    """Some rows: no one loses more under the undamped Gram matrix than the bytes that are given."""
    rows = weight.to(factor.gram.device, torch.float32)
    given = decode(grid, data.reshape(-1, grid.block_bytes))
    start = _rounded(given, rows, grid)
    bound = row_losses(_values(start, grid).T - rows, factor.gram)
    solved = _refitted(_sweep(rows, factor, grid, start), rows, factor.gram, grid)
    loss = row_losses(_values(solved, grid).T - rows, factor.gram)
    kept = ~(loss < bound)
    found = encode(grid, _blocks(solved, grid)).reshape(data.shape)
    found[kept.cpu().numpy()] = data[kept.cpu().numpy()]
    figures = torch.stack((torch.where(kept, bound, loss), bound, kept.float())).double()
    return GridRows(found, figures.cpu().numpy())


def _rounded(blocks: Blocks, rows: Tensor, grid: Grid) -> _Rounded:
    """Decoded blocks, columns first."""
    out, device = len(rows), rows.device

    def turned(values: Any) -> Tensor:
        return torch.from_numpy(values.astype(np.float32).reshape(out, -1).T.copy()).to(device)

    levels = np.asarray(grid.levels, np.float32)[blocks.codes]
    return _Rounded(*map(turned, (blocks.d, blocks.dmin, blocks.scales, blocks.mins, levels)))


def _blocks(state: _Rounded, grid: Grid) -> Blocks:
    """The inverse of `_rounded`."""

    def turned(values: Tensor, width: int) -> Any:
        return values.cpu().numpy().T.reshape(-1, width)

    subs, levels = grid.block // grid.sub, turned(state.picked, grid.block)
    codes = levels - grid.levels[0] if grid.is_even else np.searchsorted(np.asarray(grid.levels, np.float32), levels)
    return Blocks(
        turned(state.d, 1)[:, 0].astype(np.float16), turned(state.dmin, 1)[:, 0].astype(np.float16),
        turned(state.scales, subs).astype(np.int16), turned(state.mins, subs).astype(np.int16), codes.astype(np.uint8),
    )  # fmt: skip


def _values(state: _Rounded, grid: Grid) -> Tensor:
    """What rounded rows stand for, [in, rows], computed as llama.cpp does."""
    subs = grid.block // grid.sub
    scale = state.d.repeat_interleave(subs, 0) * state.scales
    least = state.dmin.repeat_interleave(subs, 0) * state.mins
    return state.picked * scale.repeat_interleave(grid.sub, 0) - least.repeat_interleave(grid.sub, 0)


def _shares(grid: Grid) -> list[float]:
    """What a search for scales tries."""
    count = len(grid.levels)
    return [*(WIDE_SHARES if count <= 8 else SHARES if count <= 16 else NARROW_SHARES)]


def _levels(grid: Grid, device: torch.device) -> tuple[float, float, Tensor]:
    """Levels as the loops take them: the least, the largest, and of a codebook the nearest to each half step.

    Entries are integers, so that what lies between two of them is on the border of two half steps.
    """
    low, high = float(grid.levels[grid.lowest]), float(grid.levels[-1])
    if grid.is_even:
        return low, high, torch.empty(0, device=device)
    levels = torch.tensor(grid.levels, dtype=torch.float32, device=device)
    halves = torch.arange(2 * low, 2 * high, device=device) / 2 + 0.25
    return low, high, levels[torch.bucketize(halves, (levels[1:] + levels[:-1]) / 2)]


def _ranges(low: int, high: int, mins: int) -> tuple[tuple[float, float], float, list[float], list[float]]:
    """Integer scales and mins as the loops take them, and what the largest of each may become."""
    parts = [end * share for end in (low, high) if end for share in SPREAD]
    return (float(low), float(high)), float(mins), parts, [mins * share for share in SPREAD]


def _sweep(rows: Tensor, factor: Factor, grid: Grid, start: _Rounded) -> _Rounded:
    """Round column after column, feeding each error forward."""
    order, feedback, weights = factor.order, factor.feedback, factor.weights
    exact = rows.T.contiguous().index_select(0, order)
    errors, picked = torch.empty_like(exact), torch.empty_like(exact)
    found = _Rounded(*(values.clone() for values in vars(start).values()))
    subs, blocks = order[:: grid.sub] // grid.sub, order[:: grid.block] // grid.block
    span = grid.block if grid.scales else PLAIN_VALUES
    for first in range(0, len(exact), span):
        part = slice(first, first + span)
        target = exact[part].clone()
        if first:
            target.addmm_(feedback[:first, part].T, errors[:first])
        here = blocks[first // grid.block : (first + span) // grid.block]
        views = target, exact[part], errors[part], picked[part], feedback[part, part], weights[part]
        _sweep_part(views, here, subs[first // grid.sub : (first + span) // grid.sub], start, found, grid)
    found.picked = torch.empty_like(picked).index_copy_(0, order, picked)
    return found


def _sweep_part(
    views: tuple[Tensor, ...], blocks: Tensor, subs: Tensor, start: _Rounded, found: _Rounded, grid: Grid
) -> None:
    """The blocks between two products with all earlier errors; what they get goes to its place in `found`."""
    levels, shares, first, least = _levels(grid, blocks.device), _shares(grid), start.d[blocks], start.dmin[blocks]
    if grid.scales is None:
        sweep = without_gil(grid_loops.sweep_plain)
        d, dmin = sweep(*views, first, least, grid.sub, *levels, grid.mins is not None, shares)
        found.d[blocks], found.dmin[blocks] = d, dmin
        return
    ranges = _ranges(*grid.scales, grid.mins or 0)
    sweep = without_gil(grid_loops.sweep_scaled)
    d, dmin, scales, mins = sweep(*views, first[0], least[0], grid.sub, *levels, *ranges, shares)
    found.d[blocks], found.dmin[blocks] = d[None], dmin[None]
    found.scales[subs], found.mins[subs] = scales, mins


def _refitted(state: _Rounded, rows: Tensor, gram: Tensor, grid: Grid) -> _Rounded:
    """Fit d and dmin of each block in turn to what was rounded, in closed form, rounded to float16 where that is less.

    Each step minimizes tr(ΔW G ΔWᵀ) over the two; pulled = G ΔWᵀ moves along.
    """
    pulled = gram @ (rows.T - _values(state, grid))
    subs = grid.block // grid.sub
    for place in range(len(state.d)):
        part, inner = slice(place * grid.block, (place + 1) * grid.block), slice(place * subs, (place + 1) * subs)
        upper = state.picked[part] * state.scales[inner].repeat_interleave(grid.sub, 0)
        lower = None if grid.mins is None else -state.mins[inner].repeat_interleave(grid.sub, 0)
        more, less = _best_step(upper, lower, pulled[part], gram[part, part], state.d[place], state.dmin[place])
        state.d[place] += more
        state.dmin[place] += less
        step = upper * more if lower is None else upper * more + lower * less
        pulled.addmm_(gram[:, part], step, alpha=-1)
    return state


def _best_step(
    upper: Tensor, lower: Tensor | None, pulled: Tensor, gram: Tensor, d: Tensor, dmin: Tensor
) -> tuple[Tensor, Tensor]:
    """How far d and dmin are from where the loss is least, as float16 can have it; 0 where that is no less."""
    first, own = gram @ upper, torch.zeros_like(d)
    slope, curve = (upper * pulled).sum(0), (upper * first).sum(0)
    if lower is None:
        more = grid_loops.half(d + slope * grid_loops.inverse(curve)) - d
        gain = more * (2 * slope - more * curve)
        return torch.where(gain > 0, more, own), own
    tilt, between = (lower * pulled).sum(0), (lower * first).sum(0)
    bend = (lower * (gram @ lower)).sum(0)
    over = grid_loops.inverse(curve * bend - between * between)
    more = grid_loops.half(d + (bend * slope - between * tilt) * over) - d
    less = grid_loops.half(dmin + (curve * tilt - between * slope) * over) - dmin
    gain = 2 * (more * slope + less * tilt) - more * more * curve - 2 * more * less * between - less * less * bend
    better = gain > 0
    return torch.where(better, more, own), torch.where(better, less, own)
