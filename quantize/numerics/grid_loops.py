"""The loops of small operations of the grid solver, as plain torch: scale searches, and rounding column after column.

In: what grid_solver prepares, columns first: [values, ..., rows]. Out: scales, mins and levels. A level is written as
its value; `table` has the nearest level for each half step from low to high, and is empty where levels are the integers
in between. Each function can be compiled as TorchScript.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nearest(steps: Tensor, low: float, high: float, table: Tensor) -> Tensor:
    """The nearest level."""
    if table.numel() == 0:
        return torch.clamp(steps.round(), low, high)
    places = ((steps - low) * 2.0).floor_().int().clamp_(0, table.numel() - 1)
    return table.index_select(0, places.view(-1)).view(steps.shape)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where that is not finite."""
    found = scale.reciprocal()
    return torch.where(torch.isfinite(found), found, torch.zeros_like(found))


def half(scale: Tensor) -> Tensor:
    """As float16 stores it, in float32."""
    return torch.clamp(scale, -65504.0, 65504.0).half().float()


def loss_of(
    values: Tensor, weights: Tensor, scale: Tensor, least: Tensor, low: float, high: float, table: Tensor
) -> Tensor:  # fmt: skip
    """Weighted squared error of values that are rounded to least + scale * level, summed over the first axis."""
    picked = nearest((values - least) * inverse(scale), low, high, table)
    error = picked.mul_(scale).add_(least).sub_(values)
    return error.square_().mul_(weights).sum(0)


def fit_scale(values: Tensor, weights: Tensor, low: float, high: float, table: Tensor, grid: list[float]) -> Tensor:
    """The scale, of either sign, by which rounding loses least: candidates, then twice a fit to the levels they give.

    values: [n, ...]. weights: [n, ...] or what broadcasts to it. grid: candidates, as shares of the one that just
    reaches the largest value. Returns [...].
    """
    none = torch.zeros_like(values[0])
    reach = values.abs().amax(0) / max(-low, high)
    best, scale = torch.full_like(reach, float("inf")), reach
    for share in grid:
        for sign in (1.0, -1.0):
            tried = reach * (share * sign)
            found = loss_of(values, weights, tried, none, low, high, table)
            better = found < best
            best, scale = torch.where(better, found, best), torch.where(better, tried, scale)
    for _ in range(2):
        picked = nearest(values * inverse(scale), low, high, table)
        below = (picked * picked * weights).sum(0)
        tried = (picked * values * weights).sum(0) * inverse(below)
        found = loss_of(values, weights, tried, none, low, high, table)
        better = found < best
        best, scale = torch.where(better, found, best), torch.where(better, tried, scale)
    return scale


def fit_line(values: Tensor, weights: Tensor, picked: Tensor, below: bool) -> tuple[Tensor, Tensor]:
    """The scale and minimum by which the picked levels lose least. below: the minimum is at most 0."""
    count = (weights + torch.zeros_like(picked)).sum(0)
    weighed = picked * weights
    first, second = weighed.sum(0), (weighed * picked).sum(0)
    total, product = (values * weights).sum(0), (values * weighed).sum(0)
    over = inverse(count * second - first * first)
    scale, least = (count * product - first * total) * over, (second * total - first * product) * over
    if below:
        above = least > 0
        scale = torch.where(above, product * inverse(second), scale)
        least = torch.where(above, torch.zeros_like(least), least)
    return scale, least


def fit_range(values: Tensor, weights: Tensor, top: float, grid: list[float], below: bool) -> tuple[Tensor, Tensor]:
    """As fit_scale for levels from 0 to top above a minimum. Returns scale and minimum."""
    empty = values.new_empty(0)
    bottom, roof = values.amin(0), values.amax(0)
    if below:
        bottom, roof = bottom.clamp(max=0.0), roof.clamp(min=0.0)
    best, scale, least = torch.full_like(bottom, float("inf")), roof - bottom, bottom
    for share in grid:
        tried, start = (roof - bottom) * (share / top), bottom * share
        found = loss_of(values, weights, tried, start, 0.0, top, empty)
        better = found < best
        best = torch.where(better, found, best)
        scale, least = torch.where(better, tried, scale), torch.where(better, start, least)
    for _ in range(2):
        picked = nearest((values - least) * inverse(scale), 0.0, top, empty)
        tried, start = fit_line(values, weights, picked, below)
        found = loss_of(values, weights, tried, start, 0.0, top, empty)
        better = found < best
        best = torch.where(better, found, best)
        scale, least = torch.where(better, tried, scale), torch.where(better, start, least)
    return scale, least


def share_scale(scales: Tensor, weights: Tensor, low: float, high: float, start: Tensor, parts: list[float]) -> Tensor:
    """The float16 that the scales [n, rows] are nearest to integer multiples of, from low to high; [rows].

    weights: [n, rows], of a scale's squared error. start: a candidate. parts: the others are the largest scale over
    each of these.
    """
    largest = scales.gather(0, scales.abs().argmax(0, keepdim=True))[0]
    found, best = start, torch.full_like(start, float("inf"))
    for place in range(len(parts) + 1):
        tried = start if place == 0 else half(largest / parts[place - 1])
        steps = torch.clamp((scales * inverse(tried)).round(), low, high)
        loss = (steps.mul_(tried).sub_(scales).square_() * weights).sum(0)
        better = loss < best
        best, found = torch.where(better, loss, best), torch.where(better, tried, found)
    return found


def settle(
    values: Tensor, weights: Tensor, d: Tensor, dmin: Tensor, scale: Tensor, least: Tensor, low: float, high: float,
    table: Tensor, scales: tuple[float, float], mins: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The integer scale and min of sub-blocks [n, rows] that lose least: those given, or those around the best fit."""
    one, other = inverse(d), inverse(dmin)
    picked = nearest((values + dmin * least) * inverse(d * scale), low, high, table)
    if mins > 0:
        around, _ = fit_line(values, weights, picked, True)
    else:
        around = (picked * values * weights).sum(0) * inverse((picked * picked * weights).sum(0))
    around = torch.clamp((around * one).round(), scales[0], scales[1])
    best = loss_of(values, weights, d * scale, -dmin * least, low, high, table)
    total = (weights + torch.zeros_like(values)).sum(0)
    found, bottom = scale, least
    for shift in (0.0, -1.0, 1.0):
        tried = torch.clamp(around + shift, scales[0], scales[1])
        under = least
        if mins > 0:
            picked = nearest((values + dmin * least) * inverse(d * tried), low, high, table)
            offset = (picked.mul_(d * tried).sub_(values) * weights).sum(0) / total
            under = torch.clamp((offset * other).round(), 0.0, mins)
        loss = loss_of(values, weights, d * tried, -dmin * under, low, high, table)
        better = loss < best
        best = torch.where(better, loss, best)
        found, bottom = torch.where(better, tried, found), torch.where(better, under, bottom)
    if mins > 0:
        middle = bottom
        for shift in (-1.0, 1.0):
            under = torch.clamp(middle + shift, 0.0, mins)
            loss = loss_of(values, weights, d * found, -dmin * under, low, high, table)
            better = loss < best
            best, bottom = torch.where(better, loss, best), torch.where(better, under, bottom)
    return found, bottom


def round_columns(
    target: Tensor, exact: Tensor, errors: Tensor, picked: Tensor, feedback: Tensor, scale: Tensor, least: Tensor,
    low: float, high: float, table: Tensor,
) -> None:  # fmt: skip
    """Round a sub-block's columns in turn: `target` [n, rows] moves on; fills `picked` and `errors` (exact - rounded).

    feedback: unit upper triangular [n, n]. scale, least: [rows].
    """
    earlier, over = feedback.t().contiguous(), inverse(scale)
    for column in range(target.shape[0]):
        value = target[column]
        if column > 0:
            value.addmv_(errors[:column].t(), earlier[column, :column])
        level = nearest((value - least) * over, low, high, table)
        picked[column] = level
        torch.sub(exact[column], level.mul_(scale).add_(least), out=errors[column])


def sweep_scaled(
    target: Tensor, exact: Tensor, errors: Tensor, picked: Tensor, feedback: Tensor, weights: Tensor, start: Tensor,
    start_min: Tensor, sub: int, low: float, high: float, table: Tensor,
    scales: tuple[float, float], mins: float, parts: list[float], min_parts: list[float], grid: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One block of a type with integer scales: commit d and dmin to the target [block, rows], then sub-block by
    sub-block.

    start, start_min: candidates for d and dmin, [rows]. Fills `errors` and `picked`. Returns d and dmin [rows], scales
    and mins [block / sub, rows].
    """
    count, rows = target.shape[0] // sub, target.shape[1]
    values = target.view(count, sub, rows).transpose(0, 1).contiguous()
    weighed = weights.view(count, sub, 1).transpose(0, 1).contiguous()
    if mins > 0:
        scale, least = fit_range(values, weighed, high, grid, True)
        total = weighed.sum(0).expand(count, rows)
        dmin = share_scale(-least, total, 0.0, mins, start_min, min_parts)
        bottoms = torch.clamp((-least * inverse(dmin)).round(), 0.0, mins)
    else:
        scale = fit_scale(values, weighed, low, high, table, grid)
        least, dmin, bottoms = torch.zeros_like(scale), start_min, torch.zeros_like(scale)
    steps = nearest((values - least) * inverse(scale), low, high, table)
    d = share_scale(scale, (steps.square_() * weighed).sum(0), scales[0], scales[1], start, parts)
    found = torch.clamp((scale * inverse(d)).round(), scales[0], scales[1])
    for place in range(count):
        first, last = place * sub, (place + 1) * sub
        part = target[first:last]
        if first > 0:
            part.addmm_(feedback[:first, first:last].t(), errors[:first])
        important = weights[first:last, None]
        one, two = settle(part, important, d, dmin, found[place], bottoms[place], low, high, table, scales, mins)
        found[place], bottoms[place] = one, two
        inner = feedback[first:last, first:last]
        round_columns(
            part, exact[first:last], errors[first:last], picked[first:last], inner, d * one, -dmin * two, low, high,
            table,
        )  # fmt: skip
    return d, dmin, found, bottoms


def sweep_plain(
    target: Tensor, exact: Tensor, errors: Tensor, picked: Tensor, feedback: Tensor, weights: Tensor, start: Tensor,
    start_min: Tensor, sub: int, low: float, high: float, table: Tensor, lifted: bool,
    grid: list[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Some blocks of a type whose d is all its scale, each fitted as it is reached.

    start, start_min: candidates for d and the minimum, [blocks, rows]. lifted: there is a minimum. Fills `errors` and
    `picked`. Returns d and minima, [blocks, rows].
    """
    d, least = start.clone(), start_min.clone()
    for place in range(d.shape[0]):
        first, last = place * sub, (place + 1) * sub
        part = target[first:last]
        if first > 0:
            part.addmm_(feedback[:first, first:last].t(), errors[:first])
        important = weights[first:last, None]
        if lifted:
            scale, bottom = fit_range(part, important, high, grid, False)
            scale, bottom = half(scale), half(bottom)
        else:
            scale = half(fit_scale(part, important, low, high, table, grid))
            bottom = torch.zeros_like(scale)
        before = loss_of(part, important, d[place], least[place], low, high, table)
        better = loss_of(part, important, scale, bottom, low, high, table) < before
        d[place] = torch.where(better, scale, d[place])
        least[place] = torch.where(better, bottom, least[place])
        inner = feedback[first:last, first:last]
        round_columns(
            part, exact[first:last], errors[first:last], picked[first:last], inner, d[place], least[place], low, high,
            table,
        )  # fmt: skip
    return d, least
