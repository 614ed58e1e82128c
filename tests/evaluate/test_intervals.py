"""How sure a figure is: intervals that hold what they should as often as they say, and no difference seen in noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from quantize.evaluate.difference import compare_quality
from quantize.evaluate.intervals import (
    Sums,
    grouped,
    kl_difference,
    mean_kl_interval,
    perplexity_ratio_interval,
    student,
)
from quantize.evaluate.record import Quality, WindowFigures
from tests.pages.measured import evaluation

PREDICTIONS = 511
KINDS = ("prose", "code", "chat", "vietnamese")


def sums_of(kl: NDArray[np.float64], kinds: tuple[str, ...] = ("",)) -> Sums:
    """kl: nats of each prediction, [windows, predictions]."""
    count = len(kl)
    names = [kinds[index * len(kinds) // count] for index in range(count)]
    total = [float(value) for value in kl.sum(axis=1)]
    return Sums(names, [kl.shape[1]] * count, total, total, [0.0] * count)


def drawn(chance: np.random.Generator, windows: int, level: float = 0.05) -> NDArray[np.float64]:
    """KL divergences as models have them: long tails, and windows that are harder than others."""
    hard = chance.lognormal(0.0, 0.5, (windows, 1))
    return level * hard * chance.lognormal(-0.72, 1.2, (windows, PREDICTIONS))


@pytest.mark.parametrize(
    ("share", "free", "expected"),  # of printed tables of Student's distribution
    [(0.975, 3, 3.182), (0.975, 10, 2.228), (0.975, 60, 2.000), (0.995, 10, 3.169), (0.995, 30, 2.750)],
)
def test_quantiles_of_student(share: float, free: int, expected: float) -> None:
    assert student(share, free) == pytest.approx(expected, rel=0.006)


@pytest.mark.parametrize("windows", [8, 17, 64])
def test_the_interval_holds_the_truth_as_often_as_it_says(windows: int) -> None:
    truth = 0.05 * math.exp(0.5**2 / 2) * math.exp(-0.72 + 1.2**2 / 2)
    held = 0
    for seed in range(200):
        found = mean_kl_interval(sums_of(drawn(np.random.default_rng(seed), windows)))
        assert found is not None
        held += found[0] <= truth <= found[1]
    assert 0.88 <= held / 200 <= 1.0, "95 %, less what a long tail takes from a few windows"


def test_the_interval_of_a_mean_is_that_of_the_central_limit() -> None:
    """Many windows that hardly differ: twice the standard error on either side."""
    chance = np.random.default_rng(1)
    values = chance.normal(10.0, 1.0, (400, 1))
    low, high = mean_kl_interval(sums_of(values)) or (0.0, 0.0)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.01)
    assert high - low == pytest.approx(2 * 1.966 * values.std(ddof=1) / 20, rel=0.05)


def test_kinds_of_text_that_differ_do_not_widen_the_interval() -> None:
    """Each kind keeps its number of windows: how far apart their means are is not chance."""
    chance = np.random.default_rng(2)
    flat = chance.normal(1.0, 0.01, (40, 8))
    apart = flat + np.repeat([0.0, 3.0, 6.0, 9.0], 10)[:, None]
    one, other = mean_kl_interval(sums_of(flat, KINDS)), mean_kl_interval(sums_of(apart, KINDS))
    assert one is not None
    assert other is not None
    assert other[1] - other[0] == pytest.approx(one[1] - one[0], rel=0.05)


def test_the_same_figures_give_the_same_interval() -> None:
    sums = sums_of(drawn(np.random.default_rng(3), 20))
    assert mean_kl_interval(sums) == mean_kl_interval(sums)


def test_the_ratio_of_perplexities() -> None:
    chance = np.random.default_rng(4)
    theirs, extra = chance.normal(1000, 200, 50), chance.normal(25, 5, 50)
    counts = [500] * 50
    sums = Sums([""] * 50, counts, [0.0] * 50, [float(x) for x in theirs + extra], [float(x) for x in theirs])
    low, high = perplexity_ratio_interval(sums) or (0.0, 0.0)
    assert low < math.exp(extra.sum() / 25_000) < high
    assert high - low < 0.01, "window by window: what is hard for both falls out"


@pytest.mark.parametrize("sums", [sums_of(np.ones((3, 4))), *(sums_of(np.full((9, 4), x)) for x in (np.inf, np.nan))])
def test_too_little_and_what_is_no_number_have_no_interval(sums: Sums) -> None:
    assert mean_kl_interval(sums) is None
    assert kl_difference(sums, sums) is None


def test_many_windows_are_taken_together_by_neighbors_of_one_kind() -> None:
    values = np.arange(50.0).reshape(50, 1)
    found = grouped(sums_of(values, ("a", "b")), most=10)
    assert list(found.kinds) == ["a"] * 5 + ["b"] * 5
    assert list(found.predictions) == [5.0] * 10
    assert list(found.kl) == [values[start : start + 5].sum() for start in range(0, 50, 5)]


# --- one artifact against another -------------------------------------------------------------------------------------


def measured(sums: Sums) -> Quality:
    figures = WindowFigures(**{name: tuple(values) for name, values in vars(sums).items()})
    found = evaluation().quality
    assert found is not None
    return found.model_copy(update={"per_window": figures})


def pair(seed: int, better: float = 0.0) -> tuple[Quality, Quality]:
    """Two artifacts that differ by chance alone, token by token, and by `better` as a share."""
    chance = np.random.default_rng(seed)
    hard = chance.lognormal(0.0, 0.5, (68, 1))
    one, other = (0.05 * hard * chance.lognormal(-0.72, 1.2, (68, PREDICTIONS)) for _ in range(2))
    return measured(sums_of(one, KINDS)), measured(sums_of(other * (1 - better), KINDS))


def test_no_true_difference_is_seldom_called_better() -> None:
    """200 pairs that differ by nothing but chance: at most 5 % are called better."""
    found = [compare_quality(*pair(seed)) for seed in range(200)]
    called = sum(item is not None and item.better != 0 for item in found)
    assert called <= 10
    assert all(item is not None for item in found)


def test_a_true_difference_is_seen() -> None:
    found = [compare_quality(*pair(seed, better=0.15)) for seed in range(20)]
    assert [item.better for item in found if item is not None] == [2] * 20


def test_what_is_said() -> None:
    same, better = compare_quality(*pair(1)), compare_quality(*pair(1, better=0.5))
    assert same is not None
    assert better is not None
    assert same.text(("a", "b")).startswith("no difference shown: the mean KL divergence of b less that of a is ")
    assert better.text(("a", "b")).startswith("b is better: its mean KL divergence is lower by 0.0")


def test_other_windows_are_not_compared() -> None:
    one, other = pair(1)
    assert compare_quality(one, other.model_copy(update={"windows_hash": "0" * 64})) is None
    assert compare_quality(one, other.model_copy(update={"per_window": None})) is None
