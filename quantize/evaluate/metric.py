"""What a metric is: how it is called, read, shown and limited. Which there are is metrics.py's.

In: an artifact's Evidence. Out: a Reading, as text for tables and pages, and as data for programs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import IntEnum, StrEnum
from typing import Any

from quantize.evaluate.decision import GateThresholds
from quantize.evaluate.record import Evidence, GoldenCount, plain

Value = float | GoldenCount


class Better(StrEnum):
    """Which way a metric is better."""

    LOWER = "lower"
    HIGHER = "higher"


class Detail(IntEnum):
    """Where figures are shown, the narrowest place first; each shows its own metrics and those of all before it."""

    LIST = 1
    """A line among many other columns: `quantize list`, `quantize build`."""
    TABLE = 2
    """A table of figures: `quantize eval`, the first one of a report."""
    PAGE = 3
    """All there is: evaluation.md, the model card, the bill of materials, `quantize show`, `quantize diff`."""


@dataclass(frozen=True)
class Limit:
    """The gate of a metric. key: of the limit in recipe/gates.py. says: how a finding puts the figure.

    doubt: what a person should look at in a figure that keeps its limit; "" if nothing. default: the limit where the
    figure was measured and none is set; None where the limit has a default anyway, or none at all.
    """

    gate: str
    key: str
    says: str = "{}"
    doubt: Callable[[float, GateThresholds], str] | None = None
    default: float | None = None


@dataclass(frozen=True)
class Metric:
    """One metric. key: in JSON. title: in a line of its own. short: over a column. unit: "" if it has none.

    read: its value of the artifact, None where it was not measured; source: the same of the source. itself: of a metric
    that compares, what the source has compared with itself. digits: after the point; is_share: shown in percent.
    detail: the narrowest place that it is shown in; None where others show it. remark: what must be known of
    the figure; "" if nothing.
    """

    key: str
    title: str
    short: str
    read: Callable[[Evidence], Value | None]
    source: Callable[[Evidence], Value | None] | None = None
    itself: float | None = None
    unit: str = ""
    digits: int = 4
    is_share: bool = False
    better: Better = Better.LOWER
    detail: Detail | None = Detail.PAGE
    limit: Limit | None = None
    remark: Callable[[Evidence], str] | None = None

    def number(self, value: Value) -> str:
        """A value of it as all tables show it, without its unit."""
        if isinstance(value, GoldenCount):
            return str(value)
        return f"{value:,.{self.digits}{'%' if self.is_share else 'f'}}"

    def with_unit(self, value: Value) -> str:
        """A value of it where no heading names the unit."""
        return f"{self.number(value)} {self.unit}".strip()

    @property
    def title_with_unit(self) -> str:
        """Its title where numbers stand without their unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def reading(self, evidence: Evidence) -> Reading | None:
        """What was measured of it; None if nothing."""
        value = self.read(evidence)
        if value is None:
            return None
        remark = self.remark(evidence) if self.remark else ""
        return Reading(self, value, self.source(evidence) if self.source else None, remark)


@dataclass(frozen=True)
class Reading:
    """A metric of one artifact, and the source's where it has one of its own.

    All that shows a figure takes it from here: an interval, or a figure for each kind of text, is added in this place.
    """

    metric: Metric
    value: Value
    source: Value | None
    remark: str

    @property
    def title(self) -> str:
        """What it is, with the remark on it."""
        return f"{self.metric.title} ({self.remark})" if self.remark else self.metric.title

    @property
    def text(self) -> str:
        """The figure as a cell under its heading."""
        return self.metric.number(self.value)

    @property
    def text_with_unit(self) -> str:
        """The figure by itself."""
        return self.metric.with_unit(self.value)

    @property
    def source_text(self) -> str:
        """The source's: measured, or what it has compared with itself; "" if it has none."""
        if self.source is not None:
            return self.metric.number(self.source)
        itself = self.metric.itself
        if itself is None:
            return ""
        return f"{itself:.0%}" if self.metric.is_share else f"{itself:g}"

    @property
    def data(self) -> Any:
        """The value for JSON."""
        return asdict(self.value) if isinstance(self.value, GoldenCount) else plain(self.value)
