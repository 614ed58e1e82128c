"""Every metric: what it is called, how it is shown and limited (METRICS).

In: an artifact's Evidence. Out: Readings, which tables, cards and pages are made of. Those ask here and name no metric,
so that a new one is a field of record.py, its line in METRICS and its measurement in measure.py. The rule of the gates
is gates.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantize.evaluate.decision import GateThresholds, Verdict
from quantize.evaluate.metric import Better, Detail, Limit, Metric, Reading
from quantize.evaluate.record import (
    EvaluationRecord,
    Evidence,
    GoldenCount,
    plain,
    read_record,
)
from quantize.recipe.gates import MAX_ERROR_RATE

LATENCY, ERROR_RATE, MEMORY = "latency", "error rate", "memory"
"""Gates on what a load test measures, which knows more about a figure than its value."""


def golden_count(found: Evidence | None) -> GoldenCount | None:
    """Golden prompts; None if none were asked."""
    return None if found is None or found.golden is None else found.golden.count


def _golden_of_source(found: Evidence) -> GoldenCount | None:
    count = golden_count(found)
    return None if count is None else GoldenCount(count.source_passed, count.source_passed, count.prompts)


def _lost(found: Evidence) -> int | None:
    return None if found.golden is None else found.golden.lost


def _conversion(found: Evidence) -> float | None:
    """On the worst kind of text."""
    if found.conversion is None:
        return None
    return max((item.mean_kl for item in found.conversion.kinds), default=found.conversion.mean_kl)


def _bound(found: Evidence) -> str:
    return "" if found.quality is None or found.quality.kl_is_exact else "a lower bound"


def _gain(ratio: float, limits: GateThresholds) -> str:
    if ratio >= 1 - limits.max_gain:
        return ""
    check = "check the baseline and whether the text was calibrated on"
    return f"a gain of over {limits.max_gain:.0%} is not plausible; {check}"


METRICS: tuple[Metric, ...] = (
    Metric(
        "perplexity", "perplexity", "perplexity", lambda text: text.perplexity, lambda text: text.source_perplexity,
        digits=2, detail=Detail.TABLE,
    ),
    Metric(
        "perplexity_ratio", "perplexity ratio", "PPL ratio", lambda text: text.perplexity_ratio,
        interval=lambda text: text.perplexity_ratio_interval, itself=1, detail=Detail.LIST,
        limit=Limit("perplexity", "max_perplexity_ratio", "{} times the source's", _gain),
    ),
    Metric(
        "mean_kl", "KL divergence, mean", "mean KL", lambda text: text.mean_kl,
        interval=lambda text: text.mean_kl_interval, itself=0, unit="nats", detail=Detail.LIST,
        limit=Limit("KL divergence", "max_kl", "mean {}"), remark=_bound,
    ),
    Metric(
        "p99_kl", "KL divergence, 99th percentile", "99 % KL", lambda text: text.p99_kl, itself=0, unit="nats",
        detail=Detail.TABLE, remark=_bound,
    ),
    Metric(
        "top_token_agreement", "same likeliest token", "same top", lambda text: text.top_token_agreement, itself=1,
        digits=1, is_share=True, better=Better.HIGHER, detail=Detail.TABLE,
    ),
    Metric(
        "conversion_kl", "KL divergence of the conversion, before quantizing", "conversion KL", read=_conversion,
        itself=0, unit="nats",
        limit=Limit("conversion", "max_conversion_kl", "mean {} before anything is quantized", optional=True),
    ),
    Metric(
        "golden", "golden prompts passed", "golden", read=golden_count, read_source=_golden_of_source,
        better=Better.HIGHER, detail=Detail.LIST,
    ),
    Metric("golden_lost", "golden prompts lost", "lost", read=_lost, itself=0, digits=0),
    Metric(
        "latency_p95_seconds", "latency, 95th percentile", "latency p95",
        read=lambda found: found.figures.latency_p95_seconds, unit="s", digits=3, detail=None,
        limit=Limit(LATENCY, "max_latency_p95_seconds", "95th percentile {}"),
    ),
    Metric(
        "error_rate", "error rate", "errors", read=lambda found: found.figures.error_rate, detail=None,
        limit=Limit(ERROR_RATE, "max_error_rate", "{} of the requests", default=MAX_ERROR_RATE),
    ),
    Metric(
        "peak_memory_bytes", "memory at the peak", "peak memory", read=lambda found: found.figures.peak_memory_bytes,
        unit="bytes", digits=0, detail=None, limit=Limit(MEMORY, "max_memory_bytes", "{} at the peak"),
    ),
)  # fmt: skip


def metrics(detail: Detail, shown: Iterable[Evidence | None] = ()) -> tuple[Metric, ...]:
    """The metrics that are shown where there is so much room, in their order.

    shown: what is in the rows; from TABLE on, each kind of text that one of them was measured on has the KL divergence
    on it.
    """
    found = [item for item in METRICS if item.detail is not None and item.detail <= detail]
    if detail >= Detail.TABLE:
        known = (item.quality.kinds for item in shown if item is not None and item.quality is not None)
        names = dict.fromkeys(item.kind for kinds in known for item in kinds)
        place = next((index for index, item in enumerate(found, 1) if item.key == "mean_kl"), len(found))
        found[place:place] = [metric("mean_kl").on(name) for name in names]
    return tuple(found)


def limited_metrics() -> list[tuple[Metric, Limit]]:
    """The metrics that a gate looks at, each with its limit."""
    return [(item, item.limit) for item in METRICS if item.limit is not None]


def metric(key: str) -> Metric:
    """The metric with this key. Raises KeyError."""
    return {item.key: item for item in METRICS}[key]


def readings(evidence: Evidence, detail: Detail = Detail.PAGE) -> list[Reading]:
    """What was measured, of the metrics that are shown where there is so much room."""
    found = [item.reading(evidence) for item in metrics(detail, [evidence])]
    return [item for item in found if item is not None]


def cells(evidence: Evidence | None, columns: Iterable[Metric], missing: str = "") -> list[str]:
    """One cell a metric; `missing` where it was not measured. Their headings are `headings`."""
    found = [None if evidence is None else item.reading(evidence) for item in columns]
    return [missing if reading is None else reading.text for reading in found]


def headings(columns: Iterable[Metric]) -> list[str]:
    """Over the columns of `cells`."""
    return [item.short for item in columns]


def figures_data(evidence: Evidence | None) -> dict[str, Any]:
    """All metrics that are shown somewhere, for JSON, with intervals and kinds of text; None where one was not
    measured.
    """
    data: dict[str, Any] = {}
    for item in metrics(Detail.PAGE):
        reading = None if evidence is None else item.reading(evidence)
        data[item.key] = None if reading is None else reading.data
        if reading is not None and reading.interval is not None:
            data[f"{item.key}_interval"] = [plain(reading.interval.low), plain(reading.interval.high)]
        if reading is not None and reading.kinds:
            data[f"{item.key}_by_kind"] = {kind.kind: plain(kind.value) for kind in reading.kinds}
    return data


@dataclass(frozen=True)
class Summary:
    """What a line of a table says of an artifact: record is None where there is none that can be read."""

    verdict: Verdict
    record: EvaluationRecord | None = None

    @classmethod
    def of(cls, measurements: Mapping[str, Any]) -> Summary:
        """The summary of what is in an artifact's measurements.json."""
        record = read_record(measurements)
        return cls(Verdict.NOT_EVALUATED) if record is None else cls(record.verdict, record)

    @property
    def golden(self) -> GoldenCount | None:
        """Golden prompts; None if none were asked."""
        return golden_count(self.record)

    def as_json(self) -> dict[str, Any]:
        """Verdict and figures as plain data."""
        return {"verdict": self.verdict.value, **figures_data(self.record)}

    def cells(self) -> list[str]:
        """The figures of a list, and the verdict."""
        return [*cells(self.record, metrics(Detail.LIST)), self.verdict.value]
