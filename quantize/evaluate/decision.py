"""What the gates say: plain data, the same in memory and in an artifact's measurements.json.

Words that are compared in other rooms are members of an enum here, with the text that JSON and pages have. The rule
itself is gates.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from quantize.recipe.gates import GateLimits

RUNS = "loads and runs"
"""The check that no limit can be loosened for: an artifact that fails it has no figures."""
QUANTIZED, NEAR, TEMPLATE = "nothing left unquantized", "weights near the source's", "chat template kept"
STRUCTURE = frozenset((QUANTIZED, NEAR, TEMPLATE))
"""What the files must be, whatever they measure (structure.py): no limit stands for that either."""


class GateOutcome(StrEnum):
    """What one gate says."""

    PASSED = "passed"
    REFUSED = "refused"
    FLAGGED = "flagged"
    INSUFFICIENT = "insufficient evidence"


class Verdict(StrEnum):
    """What all gates together say of an artifact, or that they say nothing."""

    ACCEPTED = "accepted"
    FLAGGED = "accepted with flags"
    INSUFFICIENT = "insufficient evidence"
    REFUSED = "refused"
    RISK_ACCEPTED = "risk accepted"
    NOT_EVALUATED = "not evaluated"

    @property
    def is_accepted(self) -> bool:
        """Whether every limit is kept, on evidence; a risk that was accepted is a limit that is broken."""
        return self in (Verdict.ACCEPTED, Verdict.FLAGGED)


def without_added(model: BaseModel, data: dict[str, Any]) -> dict[str, Any]:
    """Data of a record without the ADDED fields that were not given."""
    left_out = type(model).ADDED - model.model_fields_set  # type: ignore[attr-defined]
    return {key: value for key, value in data.items() if key not in left_out}


class RecordModel(BaseModel):
    """Base of all that a record holds: no value is taken for one of another kind, and what is unknown stays in it."""

    model_config = ConfigDict(defer_build=True, strict=True, frozen=True, extra="allow")
    ADDED: ClassVar[frozenset[str]] = frozenset()
    """Fields that records of earlier versions do not have: they are written only where they were given, so that a
    record that is read and written is the same, and what was signed stays signed.
    """

    @model_serializer(mode="wrap")
    def _as_it_was(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_added(self, write(self))


class GateThresholds(GateLimits):
    """The limits that an artifact is held to: a recipe's, the defaults elsewhere, and what goes with them.

    max_gain: a perplexity that is better than the source's by more is flagged, not praised: it is a wrong baseline,
    wrong text, or text that was calibrated on. golden_beyond_chance: a loss of golden prompts that chance explains is
    flagged, not refused.
    """

    model_config = ConfigDict(extra="allow")
    ADDED: ClassVar[frozenset[str]] = frozenset({"max_conversion_kl", "max_task_loss"})
    max_gain: float = 0.05
    golden_beyond_chance: bool = True

    @model_serializer(mode="wrap")
    def _as_it_was(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_added(self, write(self))


class Finding(RecordModel):
    """One gate: what came out, and a sentence with the numbers."""

    gate: str
    outcome: Annotated[GateOutcome, Field(strict=False)]
    reason: str


@dataclass(frozen=True)
class Decision:
    """All findings, in the order of the gates."""

    findings: tuple[Finding, ...]

    @property
    def accepted(self) -> bool:
        """Whether no gate refuses; missing evidence does not refuse, but is said."""
        return not self.refusals

    @property
    def refusals(self) -> tuple[Finding, ...]:
        """The gates that refuse."""
        return self._having(GateOutcome.REFUSED)

    @property
    def missing(self) -> tuple[Finding, ...]:
        """The gates without evidence."""
        return self._having(GateOutcome.INSUFFICIENT)

    @property
    def flags(self) -> tuple[Finding, ...]:
        """What a person should look at."""
        return self._having(GateOutcome.FLAGGED)

    @property
    def verdict(self) -> Verdict:
        """Refused, else insufficient evidence, else accepted with flags, else accepted."""
        if self.refusals:
            return Verdict.REFUSED
        if self.missing:
            return Verdict.INSUFFICIENT
        return Verdict.FLAGGED if self.flags else Verdict.ACCEPTED

    def _having(self, outcome: GateOutcome) -> tuple[Finding, ...]:
        return tuple(item for item in self.findings if item.outcome is outcome)
