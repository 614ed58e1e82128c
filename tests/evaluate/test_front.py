"""Which artifacts are worth having, and which one to take: by size and divergence, beyond the noise."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.evaluate.front import beaten_by, because, front, is_better, next_step, pick
from quantize.evaluate.record import Interval, Quality, WindowFigures
from tests.pages.measured import evaluation


@dataclass(frozen=True)
class Measured:
    """An artifact that has nothing but what the front looks at."""

    variant: str
    size_bytes: int
    quality: Quality | None


def one(name: str, size: int, kl: float, **changes: Any) -> Measured:
    """A single figure. changes: of the record."""
    quality = evaluation(kl=kl).quality
    assert quality is not None
    return Measured(name, size, quality.model_copy(update=changes))


def sure(name: str, size: int, kl: float, half: float) -> Measured:
    """With an interval, and no windows."""
    return one(name, size, kl, mean_kl_interval=Interval(low=kl - half, high=kl + half))


def windowed(name: str, size: int, each: Sequence[float]) -> Measured:
    """With the KL divergence of each of its windows, and an interval that is far wider than that of a difference."""
    count = len(each)
    figures = WindowFigures(
        kinds=("prose",) * count, predictions=(100,) * count, kl=tuple(100 * value for value in each),
        log_loss=(200.0,) * count, source_log_loss=(200.0,) * count,
    )  # fmt: skip
    kl = math.fsum(each) / count
    return one(name, size, kl, per_window=figures, mean_kl_interval=Interval(low=kl / 4, high=kl * 4))


def names(items: Sequence[Measured]) -> list[str]:
    return [item.variant for item in items]


def test_what_is_smaller_and_better_beats() -> None:
    items = [one("c", 300, 0.01), one("a", 100, 0.05), one("b", 200, 0.06), one("d", 400, 0.02), one("e", 500, 0.001)]
    assert names(front(items)) == ["a", "c", "e"]
    assert [(beaten_by(item, items) or item).variant for item in items] == ["c", "a", "a", "c", "e"]


def test_what_is_not_shown_to_be_better_beats_nothing() -> None:
    items = [sure("a", 100, 0.050, 0.004), sure("b", 200, 0.054, 0.004), sure("c", 200, 0.060, 0.004)]
    assert names(front(items)) == ["a", "b"]  # b may be better than a: its interval overlaps; c can't be


def test_windows_show_what_intervals_do_not() -> None:
    """Both vary a lot from window to window, and one is a little worse on each."""
    hard = np.random.default_rng(0).lognormal(-3, 0.8, 40)
    small, large = windowed("small", 100, hard), windowed("large", 200, hard * 1.05)
    assert names(front([small, large])) == ["small"]
    noise = np.random.default_rng(1).lognormal(-3, 0.8, 40)
    assert names(front([small, windowed("large", 200, noise * 1.02)])) == ["small", "large"]


def test_without_numpy_intervals_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    hard = np.random.default_rng(0).lognormal(-3, 0.8, 40)
    items = [windowed("small", 100, hard), windowed("large", 200, hard * 1.05), windowed("worst", 300, hard * 40)]
    assert names(front(items)) == ["small"]
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert names(front(items)) == ["small", "large"]  # as in an installation that only reads what others measured


def test_other_text_compares_with_nothing() -> None:
    items = [one("a", 100, 0.01), one("b", 200, 0.9, windows_hash="00" * 32)]
    assert names(front(items)) == ["a", "b"]


def test_what_was_not_measured_is_not_on_the_front() -> None:
    items = [Measured("none", 1, None), one("nan", 2, math.nan), one("inf", 3, math.inf), one("a", 100, 0.01)]
    assert names(front(items)) == ["a"]
    assert pick(items[:1]) == items[0]  # what the gates take without figures is all there is


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=9))
def test_the_front_is_a_front(pairs: list[tuple[int, int]]) -> None:
    items = [one(str(index), size, kl / 100) for index, (size, kl) in enumerate(pairs)]
    on = front(items)
    assert on
    assert not [item for item in on if any(o.size_bytes <= item.size_bytes and is_better(o, item) for o in items)]
    for item in items:
        assert (item in on) == (beaten_by(item, items) is None)
    taken = pick(items)
    assert taken is not None
    smallest = min(item.size_bytes for item in items)
    assert taken.size_bytes <= 1.05 * smallest
    assert taken in on


@pytest.mark.parametrize(
    ("items", "taken", "why"),
    [
        ([one("a", 100, 0.02)], "a", "it is the only artifact that keeps every limit"),
        (
            [one("a", 100, 0.02), one("b", 120, 0.01)], "a",
            "it is the smallest of the 2 artifacts that keep every limit",
        ),
        (
            [one("a", 1000, 0.04), one("b", 1006, 0.02)], "b",
            "it is only 0.6% larger than a, the smallest of the 2 artifacts that keep every limit, and its mean KL "
            "divergence is 0.0200 nats, not 0.0400",
        ),
        (
            [sure("a", 1000, 0.04, 0.01), sure("b", 1006, 0.03, 0.01)], "a",
            "it is the smallest of the 2 artifacts that keep every limit; b, 0.6% larger, is not shown to be better "
            "(0.0300 nats, not 0.0400)",
        ),
        (  # c is the best of the three, and b is not shown to be worse than it
            [sure("a", 100, 0.09, 0.01), sure("b", 103, 0.05, 0.01), sure("c", 105, 0.04, 0.01)], "b",
            "it is only 3.0% larger than a, the smallest of the 3 artifacts that keep every limit, and its mean KL "
            "divergence is 0.0500 nats, not 0.0900",
        ),
    ],
)  # fmt: skip
def test_which_one_to_take(items: list[Measured], taken: str, why: str) -> None:
    found = pick(items)
    assert found is not None
    assert (found.variant, because(found, items)) == (taken, why)


def test_what_more_size_buys() -> None:
    hard = np.random.default_rng(0).lognormal(-3, 0.8, 40)
    items = [windowed("a", 100, hard), windowed("b", 150, hard * 1.0001), windowed("c", 200, hard / 2)]
    text = next_step(items[0], items)
    assert text.startswith("The next better one is c: 100% larger, and its mean KL divergence is ")
    assert text.endswith(" window by window.")
    assert next_step(items[2], items) == ""
    assert pick([]) is None
