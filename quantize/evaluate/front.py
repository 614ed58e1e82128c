"""Which of several artifacts are worth having, beyond what the choice of text explains, and which one to take.

In: artifacts, each with its size and its Quality. Out: the Pareto front, what beats what is not on it, and the one to
take of those that keep every limit. The rule of the choice: the gates have already said what loss is acceptable, so the
smallest wins. A few percent of size make no difference to whoever runs it, though, and within them the lowest
divergence wins, where a difference is shown at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

from quantize.evaluate.difference import QualityDifference, compare_quality
from quantize.evaluate.metrics import metric
from quantize.evaluate.record import Quality

SAME_SIZE = 0.05
"""Files that are larger by at most this share of the smallest are as good as equal in size."""


class Sized(Protocol):
    """An artifact as the front sees it. size_bytes: of all its files. quality: None where it was not measured."""

    @property
    def variant(self) -> str: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def quality(self) -> Quality | None: ...


Item = TypeVar("Item", bound=Sized)


def divergence(item: Sized) -> float:
    """Mean KL divergence in nats; infinite where it is unknown, or no number."""
    return math.inf if item.quality is None or math.isnan(item.quality.mean_kl) else item.quality.mean_kl


def is_better(first: Sized, second: Sized) -> bool:
    """Whether the first's mean KL divergence is lower than the second's, beyond the noise.

    Window by window, as `quantize diff` compares, where both records have the same windows; else the intervals must not
    overlap. Figures without an interval are taken as they stand. On different text nothing is better than anything.
    """
    one, other = first.quality, second.quality
    if one is None or other is None or one.windows_hash != other.windows_hash:
        return False
    if not divergence(first) < divergence(second):
        return False
    found = difference(first, second)
    if found is not None:
        return found.better == 1
    if one.mean_kl_interval is None or other.mean_kl_interval is None:
        return True
    return one.mean_kl_interval.high < other.mean_kl_interval.low


def difference(first: Sized, second: Sized) -> QualityDifference | None:
    """The second's divergence less the first's, with its interval; None where they have no windows in common.

    So it is, too, where numpy is not installed, which draws the windows.
    """
    if first.quality is None or second.quality is None:
        return None
    try:
        return compare_quality(first.quality, second.quality)
    except ModuleNotFoundError:
        return None


def beats(first: Sized, second: Sized) -> bool:
    """Whether nobody would take the second: the first is no larger, and is better beyond the noise."""
    return first.size_bytes <= second.size_bytes and is_better(first, second)


def beaten_by(item: Item, others: Sequence[Item]) -> Item | None:
    """Of the artifacts that beat this one, the one that diverges least; None where it is on the front."""
    return min((other for other in others if other is not item and beats(other, item)), key=divergence, default=None)


def front(items: Sequence[Item]) -> tuple[Item, ...]:
    """By size, those that were measured and that no other one beats."""
    found = [item for item in items if math.isfinite(divergence(item)) and beaten_by(item, items) is None]
    return tuple(sorted(found, key=lambda item: (item.size_bytes, divergence(item))))


def pick(accepted: Sequence[Item]) -> Item | None:
    """Of artifacts that keep every limit, the one to take; None where there is none.

    It is the smallest of those that are at most SAME_SIZE larger than the smallest of all, and that the one of them
    with the lowest divergence is not better than, beyond the noise.
    """
    if not accepted:
        return None
    near = near_smallest(accepted)
    best = min(near, key=divergence)
    return next(item for item in near if item is best or not is_better(best, item))


def near_smallest(items: Sequence[Item]) -> list[Item]:
    """By size, the smallest and those of about its size."""
    ordered = sorted(items, key=lambda item: item.size_bytes)
    return [item for item in ordered if item.size_bytes <= ordered[0].size_bytes * (1 + SAME_SIZE)]


def because(taken: Item, accepted: Sequence[Item]) -> str:
    """Why `taken` is the one, in figures, to go after "because". accepted: all that keep every limit."""
    number = len(accepted)
    if number == 1:
        return "it is the only artifact that keeps every limit"
    near = near_smallest(accepted)
    smallest, best = near[0], min(near, key=divergence)
    if taken is not smallest:
        larger = taken.size_bytes / smallest.size_bytes - 1
        return (
            f"it is only {larger:.1%} larger than {smallest.variant}, the smallest of the {number} artifacts that keep "
            f"every limit, and its mean KL divergence is {_apart(taken, smallest)}"
        )
    why = f"it is the smallest of the {number} artifacts that keep every limit"
    if best is taken or divergence(best) == divergence(taken):
        return why
    larger = best.size_bytes / taken.size_bytes - 1
    return f"{why}; {best.variant}, {larger:.1%} larger, is not shown to be better ({_apart(best, taken)})"


def next_step(taken: Item, accepted: Sequence[Item]) -> str:
    """What more size buys, as a sentence: the next on the front that is better than what is taken; "" if none is."""
    above = (item for item in front(accepted) if item.size_bytes > taken.size_bytes)
    better = next((item for item in above if is_better(item, taken)), None)
    if better is None:
        return ""
    larger = better.size_bytes / taken.size_bytes - 1
    return (
        f"The next better one is {better.variant}: {larger:.0%} larger, and its mean KL divergence is "
        f"{_apart(better, taken)}."
    )


def _apart(lower: Sized, higher: Sized) -> str:
    """Two divergences, and how far apart they are, where that is known."""
    kl = metric("mean_kl")
    text = f"{kl.with_unit(divergence(lower))}, not {kl.number(divergence(higher))}"
    found = difference(lower, higher)
    if found is None:
        return text
    return f"{text}: {found.mean:.4f} less, between {found.low:.4f} and {found.high:.4f} window by window"
