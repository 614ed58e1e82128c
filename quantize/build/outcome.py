"""What becomes of the variants of a plan, one Outcome each.

In: what the steps of a build end with. Out: plain data, for whoever asked for the build.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from quantize.errors import QuantizeError
from quantize.store.artifact import Artifact


class OutcomeState(StrEnum):
    """What became of one variant."""

    BUILT = "built"
    EVALUATED = "evaluated"  # built before, and measured now
    UP_TO_DATE = "up to date"
    REFUSED = "refused"  # by its gates; the artifact is kept aside
    FAILED = "failed"
    SKIPPED = "skipped"  # never begun, after the failure of another


@dataclass(frozen=True)
class Outcome:
    """What became of one variant. artifact: where there is one. error: why it failed, or was refused."""

    variant: str
    state: OutcomeState
    artifact: Artifact | None = None
    error: QuantizeError | None = None
    seconds: float = 0.0
