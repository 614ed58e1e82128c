"""The best choices within a budget: against every combination, and against what no choice can beat."""

from __future__ import annotations

from itertools import product
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.numerics import allocation
from quantize.numerics.allocation import allocate, least_size

UNIT = st.lists(st.tuples(st.integers(1, 60), st.floats(0, 100)), min_size=1, max_size=4)
CHOICES = [2.0, 2.6, 3.4, 4.25, 4.5, 5.5, 6.6, 8.5]


def sizes_and_losses(units: list[list[tuple[int, float]]], picked: tuple[int, ...]) -> tuple[int, float]:
    chosen = [unit[choice] for unit, choice in zip(units, picked, strict=True)]
    return sum(size for size, _ in chosen), sum(loss for _, loss in chosen)


def best(units: list[list[tuple[int, float]]], budget: int) -> float:
    """By trying every combination."""
    found = (sizes_and_losses(units, picked) for picked in product(*(range(len(unit)) for unit in units)))
    return min(loss for size, loss in found if size <= budget)


@given(st.lists(UNIT, min_size=1, max_size=5), st.integers(0, 150))
@settings(max_examples=150, deadline=None)
def test_it_is_within_the_budget_and_no_worse_than_the_bound(units: list[list[tuple[int, float]]], more: int) -> None:
    budget = least_size(units) + more
    found = allocate(units, budget)
    assert (found.size, pytest.approx(found.loss)) == sizes_and_losses(units, found.picked)
    assert found.size <= budget
    least = best(units, budget)
    assert found.loss == pytest.approx(least)
    with mock.patch.object(allocation, "MOST_CELLS", 0):
        walked = allocate(units, budget)
    assert walked.size <= budget
    assert walked.bound <= least + 1e-9 * (1 + abs(least))
    assert walked.loss >= least - 1e-9 * (1 + abs(least))


@given(st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 8)), min_size=2, max_size=5), st.floats(0.05, 1.0))
@settings(max_examples=100, deadline=None)
def test_matrices_and_types_are_chosen_as_well_as_by_trying_all(
    matrices: list[tuple[float, int]], share: float
) -> None:
    """Losses as rounding has them: a quarter for each bit more; sizes of matrices that are multiples of one another."""
    units = [[(round(32 * width * bits), weight * 4.0**-bits) for bits in CHOICES] for weight, width in matrices]
    least, most = least_size(units), sum(unit[-1][0] for unit in units)
    budget = round(least + share * (most - least))
    found = allocate(units, budget)
    assert found.loss == pytest.approx(best(units, budget), rel=1e-9)
    assert found.bound == found.loss


@given(st.integers(0, 1000), st.floats(0.05, 0.95))
@settings(max_examples=30, deadline=None)
def test_of_many_matrices_the_hulls_find_nearly_the_best(seed: int, share: float) -> None:
    """Against the best of all, which the same sizes are few enough for."""
    random = np.random.default_rng(seed)
    units = [
        [(32 * width * round(10 * bits), weight * 4.0**-bits) for bits in CHOICES]
        for weight, width in zip(10 ** random.uniform(-3, 0, 120), random.integers(1, 9, 120).tolist(), strict=True)
    ]
    least, most = least_size(units), sum(unit[-1][0] for unit in units)
    budget = round(least + share * (most - least))
    exact = allocate(units, budget)
    with mock.patch.object(allocation, "MOST_CELLS", 0):
        found = allocate(units, budget)
    assert found.size <= budget
    assert found.bound <= exact.loss * (1 + 1e-9)
    assert exact.loss * (1 - 1e-9) <= found.loss <= 1.02 * exact.loss


def test_a_step_of_the_hull_that_just_fits_is_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    units = [[(10, 8.0), (20, 3.0), (40, 1.0)], [(10, 4.0), (20, 2.0), (40, 1.5)]]
    monkeypatch.setattr(allocation, "MOST_CELLS", 0)
    for budget, picked in ((20, (0, 0)), (30, (1, 0)), (40, (1, 1)), (60, (2, 1)), (80, (2, 2))):
        found = allocate(units, budget)
        assert (found.picked, found.size) == (picked, budget)
        assert found.loss == pytest.approx(found.bound) == pytest.approx(best(units, budget))


def test_a_pair_of_moves_is_found_that_no_single_move_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first unit's step gains most for a byte and leaves nothing for the second's, which gains more in all."""
    monkeypatch.setattr(allocation, "MOST_CELLS", 0)
    units = [[(1, 10.0), (4, 6.5)], [(1, 10.0), (6, 4.5)]]
    found = allocate(units, 7)
    assert found.picked == (0, 1)
    assert found.loss == best(units, 7)


def test_a_budget_below_the_least_is_refused() -> None:
    with pytest.raises(ValueError, match="the least is 6, more than 5"):
        allocate([[(3, 1.0), (4, 0.0)], [(3, 1.0)]], 5)


def test_what_costs_more_bytes_and_more_loss_is_never_chosen() -> None:
    assert allocate([[(5, 1.0), (6, 2.0), (7, 0.5)]], 6).picked == (0,)
