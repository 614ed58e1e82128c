"""Whether one of two artifacts is better than the other, beyond what the choice of text explains.

In: the Quality of both. Out: a QualityDifference, with an interval, or why there is none. Both must have been measured
on the same windows: the difference is taken window by window, so that what is hard for both falls out of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from quantize.evaluate.intervals import DIFFERENCE_LEVEL, Sums, kl_difference
from quantize.evaluate.record import Quality


@dataclass(frozen=True)
class QualityDifference:
    """mean: the second's mean KL divergence less the first's, in nats; low and high: where it lies."""

    mean: float
    low: float
    high: float

    @property
    def better(self) -> int:
        """1 or 2, the one that is better; 0 where no difference is shown."""
        return 1 if self.low > 0 else 2 if self.high < 0 else 0

    def text(self, names: tuple[str, str]) -> str:
        """A sentence. names: of both."""
        level = f"{DIFFERENCE_LEVEL:.0%}"
        if self.better == 0:
            return (
                f"no difference shown: the mean KL divergence of {names[1]} less that of {names[0]} is "
                f"{self.mean:+.4f} nats, and lies between {self.low:+.4f} and {self.high:+.4f} ({level})"
            )
        ends = sorted((abs(self.low), abs(self.high)))
        return (
            f"{names[self.better - 1]} is better: its mean KL divergence is lower by {abs(self.mean):.4f} nats, "
            f"between {ends[0]:.4f} and {ends[1]:.4f} ({level})"
        )


def compare_quality(first: Quality, second: Quality) -> QualityDifference | None:
    """The difference between two artifacts; None where they can't be compared window by window."""
    if first.windows_hash != second.windows_hash or first.per_window is None or second.per_window is None:
        return None
    one, other = (Sums(**dict(item.per_window)) for item in (first, second) if item.per_window is not None)
    try:
        found = kl_difference(one, other)
    except ValueError:
        return None
    if found is None:
        return None
    total = math.fsum(one.predictions)
    if total == 0:
        return None
    return QualityDifference((math.fsum(other.kl) - math.fsum(one.kl)) / total, *found)
