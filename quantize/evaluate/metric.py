"""What a metric is: how it is called, read, shown and limited. Which there are is metrics.py's.

In: an artifact's Evidence. Out: a Reading, as text for tables and pages, and as data for programs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from enum import IntEnum, StrEnum
from typing import Any

from quantize.evaluate.decision import GateThresholds
from quantize.evaluate.record import Evidence, GoldenCount, Interval, TextFigures, plain

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
    optional: bool = False


@dataclass(frozen=True)
class Metric:
    """One metric. key: in JSON. title: in a line of its own. short: over a column. unit: "" if it has none.

    of_text: its value on some text, for a metric that is measured on text; source: the same of the source; interval:
    where it lies. read: its value where it is no such metric, None where it was not measured; read_source: the
    source's. kind: of the text that it looks at, "" for all. itself: of a metric that compares, what the source has
    compared with itself. digits: after the point; is_share: shown in percent. detail: the narrowest place that it is
    shown in; None where others show it. remark: what must be known of the figure; "" if nothing.
    """

    key: str
    title: str
    short: str
    of_text: Callable[[TextFigures], float] | None = None
    source: Callable[[TextFigures], float] | None = None
    interval: Callable[[TextFigures], Interval | None] | None = None
    read: Callable[[Evidence], Value | None] | None = None
    read_source: Callable[[Evidence], Value | None] | None = None
    kind: str = ""
    itself: float | None = None
    unit: str = ""
    digits: int = 4
    is_share: bool = False
    better: Better = Better.LOWER
    detail: Detail | None = Detail.PAGE
    limit: Limit | None = None
    remark: Callable[[Evidence], str] | None = None

    def on(self, kind: str) -> Metric:
        """The same on one kind of text, which no gate looks at by itself."""
        name, short = self.title.partition(",")[0], self.short.removeprefix("mean ")
        return replace(
            self, key=f"{self.key}.{kind}", title=f"{name}, {kind}", short=f"{short} {kind}", kind=kind, limit=None
        )

    def number(self, value: Value) -> str:
        """A value of it as all tables show it, without its unit."""
        if isinstance(value, GoldenCount):
            return str(value)
        return f"{value:,.{self.digits}{'%' if self.is_share else 'f'}}"

    def with_interval(self, value: Value, interval: Interval | None) -> str:
        """A value of it as a cell, with the half width of its interval where it has one."""
        return self.number(value) + ("" if interval is None else f" ± {self.number(interval.half_width)}")

    def with_unit(self, value: Value) -> str:
        """A value of it where no heading names the unit."""
        return f"{self.number(value)} {self.unit}".strip()

    @property
    def title_with_unit(self) -> str:
        """Its title where numbers stand without their unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def reading(self, evidence: Evidence) -> Reading | None:
        """What was measured of it; None if nothing."""
        remark = self.remark(evidence) if self.remark else ""
        if self.of_text is None:
            value = self.read(evidence) if self.read is not None else None
            source = self.read_source(evidence) if self.read_source is not None else None
            return None if value is None else Reading(self, value, source, remark)
        figures = self._figures(evidence)
        if figures is None:
            return None
        theirs = self.source(figures) if self.source is not None else None
        kinds = evidence.quality.kinds if evidence.quality is not None and not self.kind else ()
        found = tuple(KindReading(item.kind, self.of_text(item), self._interval(item)) for item in kinds)
        return Reading(self, self.of_text(figures), theirs, remark, self._interval(figures), found)

    def _figures(self, evidence: Evidence) -> TextFigures | None:
        if evidence.quality is None or not self.kind:
            return evidence.quality
        return next((item for item in evidence.quality.kinds if item.kind == self.kind), None)

    def _interval(self, figures: TextFigures) -> Interval | None:
        return self.interval(figures) if self.interval is not None else None


@dataclass(frozen=True)
class KindReading:
    """A metric on one kind of text. kind: "" for all of it."""

    kind: str
    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Reading:
    """A metric of one artifact, and the source's where it has one of its own.

    interval: of the value. kinds: by the kind of text, where there are several. All that shows a figure takes it from
    here.
    """

    metric: Metric
    value: Value
    source: Value | None
    remark: str
    interval: Interval | None = None
    kinds: tuple[KindReading, ...] = ()

    @property
    def title(self) -> str:
        """What it is, with the remark on it."""
        return f"{self.metric.title} ({self.remark})" if self.remark else self.metric.title

    @property
    def text(self) -> str:
        """The figure as a cell under its heading, with the half width of its interval."""
        return self.metric.with_interval(self.value, self.interval)

    @property
    def text_with_unit(self) -> str:
        """The figure by itself."""
        return f"{self.text} {self.metric.unit}".strip()

    @property
    def each(self) -> tuple[KindReading, ...]:
        """By the kind of text; the one figure where there is but one kind."""
        assert not isinstance(self.value, GoldenCount)
        return self.kinds or (KindReading("", self.value, self.interval),)

    def kind_text(self, item: KindReading) -> str:
        """The figure of one kind as a cell."""
        return self.metric.with_interval(item.value, item.interval)

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
