"""What becomes of the variants of a plan, one Outcome each.

In: what the steps of a build end with. Out: Outcomes, told to the reporter as they come, for whoever asked for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from quantize.errors import DiskFullError, QuantizeError
from quantize.events import Event, EventKind, Reporter, warn
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


class Ledger:
    """The outcomes of one execution. keep_going: go on with others after a failure."""

    def __init__(self, reporter: Reporter, *, keep_going: bool) -> None:
        self._reporter, self._keep_going = reporter, keep_going
        self.outcomes: dict[str, Outcome] = {}

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome, and tell it."""
        self.outcomes[outcome.variant] = outcome
        if outcome.error is not None:
            self._reporter.emit(Event(EventKind.FAILED, outcome.variant, str(outcome.error)))
        elif outcome.state is OutcomeState.SKIPPED:
            warn(self._reporter, outcome.variant, "skipped: another variant failed")
        else:
            where = f": {outcome.artifact.folder}" if outcome.artifact else ""
            self._reporter.emit(Event(EventKind.DONE, outcome.variant, f"{outcome.state}{where}"))

    def has_made(self, variant: str) -> bool:
        """Whether there is an artifact of a variant."""
        return variant in self.outcomes and self.outcomes[variant].artifact is not None

    def goes_on(self, variant: str) -> bool:
        """Whether to begin with a variant after what has failed: what lacks space would only fail as well.

        One that is not to be begun is skipped.
        """
        errors = [item.error for item in self.outcomes.values() if item.error is not None]
        if not errors or (self._keep_going and not any(isinstance(item, DiskFullError) for item in errors)):
            return True
        self.add(Outcome(variant, OutcomeState.SKIPPED))
        return False
