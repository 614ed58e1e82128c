"""How sure a figure is: intervals by the bootstrap over windows of text.

In: sums over the predictions of each window. Out: intervals of their ratios, and of the difference between two
artifacts that were measured on the same windows. Windows are drawn, not tokens, for the tokens of one window go
together; each kind of text keeps its number of windows. The same figures give the same interval: draws come from a
fixed seed.

The interval is the "expanded percentile" one (Tim Hesterberg, "What Teachers Should Know about the Bootstrap", The
American Statistician 69(4), 2015, section 5.3): the plain percentile interval is too narrow where windows are few, as
the bootstrap's spread is that of n - 1 of n, and it takes the normal distribution's width for Student's.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]

LEVEL = 0.95
DIFFERENCE_LEVEL = 0.99
"""Of the difference between two artifacts: one in a hundred pairs without any is called one."""
RESAMPLES = 10_000
LEAST_WINDOWS = 4
"""Fewer say nothing of how much windows differ."""
MAX_GROUPS = 512
_SEED = 20_150_901
_DRAWS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Sums:
    """What was summed up over the predictions of each window (or of neighboring windows taken together).

    kinds: the kind of text of each. predictions: how many. kl: nats. log_loss, source_log_loss: minus the
    log-probability of the token that came, in nats, by the artifact and by its source.
    """

    kinds: Sequence[str]
    predictions: Sequence[float]
    kl: Sequence[float]
    log_loss: Sequence[float]
    source_log_loss: Sequence[float]


def grouped(sums: Sums, most: int = MAX_GROUPS) -> Sums:
    """At most about `most` rows: neighboring windows of one kind are taken together, as many for each."""
    size = math.ceil(len(sums.kinds) / most)
    if size <= 1:
        return sums
    starts: list[int] = []
    for row, kind in enumerate(sums.kinds):
        if not starts or sums.kinds[starts[-1]] != kind or row - starts[-1] == size:
            starts.append(row)
    ends = [*starts[1:], len(sums.kinds)]

    def added(values: Sequence[float]) -> list[float]:
        return [math.fsum(values[start:end]) for start, end in zip(starts, ends, strict=True)]

    return Sums(
        [sums.kinds[start] for start in starts], added(sums.predictions), added(sums.kl), added(sums.log_loss),
        added(sums.source_log_loss),
    )  # fmt: skip


def mean_kl_interval(sums: Sums, level: float = LEVEL) -> tuple[float, float] | None:
    """Of the mean KL divergence in nats; None where there are too few windows, or a sum is not finite."""
    return _interval(sums.kinds, [sums.kl, sums.predictions], lambda drawn: drawn[0] / drawn[1], level)


def perplexity_ratio_interval(sums: Sums, level: float = LEVEL) -> tuple[float, float] | None:
    """Of the artifact's perplexity over the source's; None as for the KL divergence."""
    import numpy as np

    columns = [sums.log_loss, sums.source_log_loss, sums.predictions]
    return _interval(sums.kinds, columns, lambda drawn: np.exp((drawn[0] - drawn[1]) / drawn[2]), level)


def kl_difference(first: Sums, second: Sums, level: float = DIFFERENCE_LEVEL) -> tuple[float, float] | None:
    """Of the second's mean KL divergence less the first's, window by window; None as above.

    Both must be sums of the same windows. Raises ValueError if they aren't.
    """
    if list(first.kinds) != list(second.kinds) or list(first.predictions) != list(second.predictions):
        raise ValueError("the two were measured on different windows")
    columns = [second.kl, first.kl, first.predictions]
    return _interval(first.kinds, columns, lambda drawn: (drawn[0] - drawn[1]) / drawn[2], level)


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], level: float = LEVEL
) -> tuple[float, float] | None:
    """Of the mean of our scores less that of theirs, on the same samples; None where there are too few.

    Scores of right and wrong (1 and 0): the interval of Alan Agresti and Yongyi Min ("Simple improved confidence
    intervals for comparing matched proportions", Statistics in Medicine 24(5), 2005), which adds half a sample to each
    of the four cells: that no answer has changed in 50 does not say that none will, as a bootstrap has it. Other
    scores: the bootstrap above.
    """
    if len(ours) < LEAST_WINDOWS:
        return None
    if {*ours, *theirs} <= {0.0, 1.0}:
        return _of_matched(sum(map(float.__gt__, ours, theirs)), sum(map(float.__lt__, ours, theirs)), len(ours), level)
    size = math.ceil(len(ours) / MAX_GROUPS)
    starts = range(0, len(ours), size)
    columns = [[math.fsum(values[start : start + size]) for start in starts] for values in (ours, theirs)]
    counts = [float(min(size, len(ours) - start)) for start in starts]
    return _interval([""] * len(counts), [*columns, counts], lambda drawn: (drawn[0] - drawn[1]) / drawn[2], level)


def _of_matched(gained: int, lost: int, samples: int, level: float) -> tuple[float, float]:
    of, changed, more = samples + 2, gained + lost + 1, gained - lost
    middle = more / of
    half = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(changed - more**2 / of) / of
    return max(-1.0, middle - half), min(1.0, middle + half)


def _interval(
    kinds: Sequence[str], columns: list[Sequence[float]], statistic: Statistic, level: float
) -> tuple[float, float] | None:
    import numpy as np

    values = np.asarray(columns, np.float64)
    names = list(dict.fromkeys(kinds))
    members = [np.flatnonzero([kind == name for kind in kinds]) for name in names]
    free = sum(len(rows) - 1 for rows in members)  # degrees of freedom
    if free < LEAST_WINDOWS - 1 or not np.isfinite(values).all():
        return None
    with np.errstate(over="ignore"):
        drawn = statistic(_drawn(values, members))
    tail = _tail(level, free, len(kinds) / free)
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def _drawn(values: NDArray[np.float64], members: Sequence[NDArray[np.intp]]) -> NDArray[np.float64]:
    """Sums [columns, resamples] over windows drawn with replacement, each kind's own number of them."""
    import numpy as np

    found = np.zeros((len(values), RESAMPLES))
    for rows, times in zip(members, _draws(tuple(len(rows) for rows in members)), strict=True):
        found += values[:, rows] @ times.T.astype(np.float64)
    return found


@functools.lru_cache(maxsize=2)
def _draws(counts: tuple[int, ...]) -> tuple[NDArray[np.uint16], ...]:
    """How often each window is drawn, [resamples, windows] for each kind with so many of them.

    Kept, for artifacts that are compared have the same windows, and drawing takes longer than all else.
    """
    import numpy as np

    chance = np.random.Generator(np.random.PCG64(_SEED))
    found = []
    for count in counts:
        times = np.empty((RESAMPLES, count), np.uint16)
        step = max(1, _DRAWS_AT_ONCE // count)
        for start in range(0, RESAMPLES, step):
            stop = min(start + step, RESAMPLES)
            times[start:stop] = chance.multinomial(count, np.full(count, 1 / count), size=stop - start)
        found.append(times)
    return tuple(found)


def _tail(level: float, free: int, shrunk: float) -> float:
    """Share of the draws outside of either end. shrunk: by how much the draws' variance falls short of the sums'."""
    return NormalDist().cdf(-student(1 - (1 - level) / 2, free) * math.sqrt(shrunk))


def student(share: float, free: int) -> float:
    """Quantile of Student's distribution by its series in 1 / degrees of freedom (Abramowitz and Stegun, 26.7.5)."""
    x = NormalDist().inv_cdf(share)
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92_160,
    )
    return x + math.fsum(term / math.pow(free, order) for order, term in enumerate(terms, 1))
