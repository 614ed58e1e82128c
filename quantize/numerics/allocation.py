"""One choice for each of many units, so that the sum of their losses is least and that of their sizes within a budget.

In: for each unit its choices, a size and a loss each. Out: an Allocation, and how far from the best it can be at most.
Method: the multiple-choice knapsack by its Lagrangian relaxation (Shoham and Gersho 1988, "Efficient bit allocation for
an arbitrary set of quantizers"; Kellerer, Pferschy and Pisinger, "Knapsack Problems", chapter 11). Each unit walks up
the convex hull of its choices, the step that gains most for a byte first; that is the best for the bytes that it takes.
What is left is filled with single choices, then with pairs of which one takes what the other gives back. Where units
and sizes are few, all sums of sizes are gone through instead (dynamic programming), which gives the best there is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Choices = Sequence[tuple[int, float]]  # size, loss
MOST_EXCHANGES = 1000
MOST_CELLS = 8_000_000  # units times sums of sizes, that all of them are gone through


@dataclass(frozen=True)
class Allocation:
    """picked: for each unit the index of its choice. size, loss: sums. bound: the least that any could lose."""

    picked: tuple[int, ...]
    size: int
    loss: float
    bound: float


@dataclass(frozen=True)
class _Step:
    """From one choice of a unit's hull to the next. gain: loss that goes for each byte."""

    unit: int
    choice: int
    size: int
    loss: float
    gain: float


@dataclass
class _UnderWay:
    """An allocation under way."""

    units: Sequence[Choices]
    budget: int
    picked: list[int] = field(default_factory=list)
    left: int = 0

    def move(self, unit: int, choice: int) -> None:
        """Give a unit another choice."""
        self.left += self.units[unit][self.picked[unit]][0] - self.units[unit][choice][0]
        self.picked[unit] = choice


def least_size(units: Sequence[Choices]) -> int:
    """The size of the smallest choice of each unit together."""
    return sum(min(size for size, _ in choices) for choices in units)


def allocate(units: Sequence[Choices], budget: int) -> Allocation:
    """The choices with the least loss within a budget: the best, or what a hull walk, a fill and exchanges find.

    Raises ValueError: the smallest choices together are over the budget.
    """
    hulls = [_hull(choices) for choices in units]
    state = _UnderWay(units, budget, [hull[0] for hull in hulls])
    state.left = budget - sum(units[unit][choice][0] for unit, choice in enumerate(state.picked))
    if state.left < 0:
        raise ValueError(f"the least is {budget - state.left}, more than {budget}")
    smallest = [min(size for size, _ in choices) for choices in units]
    steps = [size - least for choices, least in zip(units, smallest, strict=True) for size, _ in choices]
    step = math.gcd(*steps) or 1
    if len(units) * (min(state.left, sum(steps)) // step + 1) <= MOST_CELLS:
        return _best(units, smallest, min(state.left, sum(steps)) // step, step)
    bound = _walk(state, hulls)
    for _ in range(MOST_EXCHANGES):
        if not _exchange(state):
            break
    chosen = [units[unit][choice] for unit, choice in enumerate(state.picked)]
    return Allocation(tuple(state.picked), sum(size for size, _ in chosen), sum(loss for _, loss in chosen), bound)


def _best(units: Sequence[Choices], smallest: Sequence[int], room: int, step: int) -> Allocation:
    """The best of all. room: steps that all units together may be larger than the smallest choices."""
    least = np.zeros(room + 1)  # loss of the units so far, with so many steps or fewer
    taken = np.zeros((len(units), room + 1), np.uint8)
    for unit, (choices, start) in enumerate(zip(units, smallest, strict=True)):
        found = np.full(room + 1, np.inf)
        for index, (size, loss) in enumerate(choices):
            more = (size - start) // step
            if more > room:
                continue
            tried = least[: room + 1 - more] + loss
            better = tried < found[more:]
            found[more:][better] = tried[better]
            taken[unit, more:][better] = index
        least = found
    picked, left = [0] * len(units), room
    for unit in reversed(range(len(units))):
        picked[unit] = int(taken[unit, left])
        left -= (units[unit][picked[unit]][0] - smallest[unit]) // step
    chosen = [choices[choice] for choices, choice in zip(units, picked, strict=True)]
    loss = sum(loss for _, loss in chosen)
    return Allocation(tuple(picked), sum(size for size, _ in chosen), loss, loss)


def _hull(choices: Choices) -> list[int]:
    """Indices of the lower convex hull of a unit's choices, by rising size and falling loss."""
    hull: list[int] = []
    for index in sorted(range(len(choices)), key=lambda item: (choices[item], item)):
        if hull and choices[index][1] >= choices[hull[-1]][1]:
            continue
        while len(hull) > 1 and _gain(choices, hull[-2], hull[-1]) <= _gain(choices, hull[-2], index):
            hull.pop()
        hull.append(index)
    return hull


def _gain(choices: Choices, before: int, after: int) -> float:
    return (choices[before][1] - choices[after][1]) / max(1, choices[after][0] - choices[before][0])


def _walk(state: _UnderWay, hulls: Sequence[Sequence[int]]) -> float:
    """Up the hulls, the best step first; a unit whose step does not fit stays. Returns the bound: the first step that
    does not fit, taken in part, is the best of the relaxed problem.
    """
    steps = [
        _Step(unit, after, choices[after][0] - choices[before][0], choices[before][1] - choices[after][1],
              _gain(choices, before, after))
        for unit, (choices, hull) in enumerate(zip(state.units, hulls, strict=True))
        for before, after in pairwise(hull)
    ]  # fmt: skip
    loss = sum(choices[hull[0]][1] for choices, hull in zip(state.units, hulls, strict=True))
    bound: float | None = None
    stays: set[int] = set()
    for step in sorted(steps, key=lambda item: (-item.gain, item.unit, item.choice)):
        if step.unit not in stays and step.size <= state.left:
            state.move(step.unit, step.choice)
            loss -= step.loss
            continue
        if bound is None:
            bound = loss - step.loss * state.left / step.size
        stays.add(step.unit)
    return loss if bound is None else bound


def _exchange(state: _UnderWay) -> bool:
    """The best of all single moves and pairs of moves that fit; whether there is one that lessens the loss."""
    moves = [
        (choices[choice][0] - choices[now][0], choices[choice][1] - choices[now][1], unit, choice)
        for unit, (choices, now) in enumerate(zip(state.units, state.picked, strict=True))
        for choice in range(len(choices))
        if choice != now
    ]
    if not moves:
        return False
    moves.sort()
    sizes, losses = (np.array([move[place] for move in moves]) for place in (0, 1))
    units = [move[2] for move in moves]
    firsts, seconds = _least_before(losses, units)
    best, taken = 0.0, (-1, -1)
    for index, room in enumerate(state.left - sizes):
        if room >= 0 and losses[index] < best:
            best, taken = float(losses[index]), (index, -1)
        end = int(np.searchsorted(sizes, room, side="right")) - 1
        if end < 0:
            continue
        other = firsts[end] if units[firsts[end]] != units[index] else seconds[end]
        if other >= 0 and losses[index] + losses[other] < best:
            best, taken = float(losses[index] + losses[other]), (index, other)
    scale = sum(abs(choices[now][1]) for choices, now in zip(state.units, state.picked, strict=True))
    if best >= -1e-12 * scale:
        return False
    for index in taken:
        if index >= 0:
            state.move(*moves[index][2:])
    return True


def _least_before(losses: NDArray[Any], units: Sequence[int]) -> tuple[list[int], list[int]]:
    """For each move the one with the least loss up to it, and the best of another unit than that one's, -1 for none."""
    firsts, seconds, first, second = [], [], -1, -1
    for index, loss in enumerate(losses):
        if first < 0 or loss < losses[first]:
            if first >= 0 and units[first] != units[index]:
                second = first
            first = index
        elif units[index] != units[first] and (second < 0 or loss < losses[second]):
            second = index
        firsts.append(first)
        seconds.append(second)
    return firsts, seconds
