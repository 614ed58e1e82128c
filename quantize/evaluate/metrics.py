"""Every metric: what it is called, how it is shown and limited (METRICS), and how quality is measured (measure).

In: an artifact's Evidence; a Runtime with the artifact, Windows, the source's Baseline. Out: Readings, which tables,
cards and pages are made of; Quality. Those ask here and name no metric, so that a new one is a field of record.py, its
line in METRICS and its measurement below. The rule of the gates is gates.py's.

Kullback-Leibler divergence of source P and artifact Q, in nats, for each predicted token: sum P log(P / Q). Where only
the source's likeliest 1,024 tokens are kept, all others count as one: that is a lower bound (the log-sum inequality;
Cover and Thomas, "Elements of Information Theory", theorem 2.7.1). Measured on the demo model it is 2.4 % below the
whole sum over 49,152 tokens (Q8_0 0.00406 of 0.00415, Q4_K_M 0.0587 of 0.0601).
A model compared with its own Baseline gives 0 exactly: both sides go through the same rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantize.errors import VerifyError
from quantize.evaluate.decision import GateThresholds, Verdict
from quantize.evaluate.metric import Better, Detail, Limit, Metric, Reading
from quantize.evaluate.record import EvaluationRecord, Evidence, GoldenCount, Quality, read_record
from quantize.recipe.gates import MAX_ERROR_RATE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from quantize.evaluate.baseline import Baseline, Compressed
    from quantize.evaluate.text import Windows
    from quantize.events import Reporter
    from quantize.runtimes.base import Runtime

LATENCY, ERROR_RATE, MEMORY = "latency", "error rate", "memory"
"""Gates on what a load test measures, which knows more about a figure than its value."""


def _of(read: Callable[[Quality], float | None]) -> Callable[[Evidence], float | None]:
    return lambda found: None if found.quality is None else read(found.quality)


def golden_count(found: Evidence | None) -> GoldenCount | None:
    """Golden prompts; None if none were asked."""
    return None if found is None or found.golden is None else found.golden.count


def _golden_of_source(found: Evidence) -> GoldenCount | None:
    count = golden_count(found)
    return None if count is None else GoldenCount(count.source_passed, count.source_passed, count.prompts)


def _lost(found: Evidence) -> int | None:
    return None if found.golden is None else found.golden.lost


def _bound(found: Evidence) -> str:
    return "" if found.quality is None or found.quality.kl_is_exact else "a lower bound"


def _gain(ratio: float, limits: GateThresholds) -> str:
    if ratio >= 1 - limits.max_gain:
        return ""
    check = "check the baseline and whether the text was calibrated on"
    return f"a gain of over {limits.max_gain:.0%} is not plausible; {check}"


METRICS: tuple[Metric, ...] = (
    Metric(
        "perplexity", "perplexity", "perplexity", _of(lambda quality: quality.perplexity),
        source=_of(lambda quality: quality.source_perplexity), digits=2, detail=Detail.TABLE,
    ),
    Metric(
        "perplexity_ratio", "perplexity ratio", "PPL ratio", _of(lambda quality: quality.perplexity_ratio), itself=1,
        detail=Detail.LIST, limit=Limit("perplexity", "max_perplexity_ratio", "{} times the source's", _gain),
    ),
    Metric(
        "mean_kl", "KL divergence, mean", "mean KL", _of(lambda quality: quality.mean_kl), itself=0, unit="nats",
        detail=Detail.LIST, limit=Limit("KL divergence", "max_kl", "mean {}"), remark=_bound,
    ),
    Metric(
        "p99_kl", "KL divergence, 99th percentile", "99 % KL", _of(lambda quality: quality.p99_kl), itself=0,
        unit="nats", detail=Detail.TABLE, remark=_bound,
    ),
    Metric(
        "top_token_agreement", "same likeliest token", "same top", _of(lambda quality: quality.top_token_agreement),
        itself=1, digits=1, is_share=True, better=Better.HIGHER, detail=Detail.TABLE,
    ),
    Metric(
        "golden", "golden prompts passed", "golden", golden_count, source=_golden_of_source, better=Better.HIGHER,
        detail=Detail.LIST,
    ),
    Metric(
        "golden_lost", "golden prompts lost", "lost", _lost, itself=0, digits=0,
    ),
    Metric(
        "latency_p95_seconds", "latency, 95th percentile", "latency p95",
        lambda found: found.figures.latency_p95_seconds, unit="s", digits=3, detail=None,
        limit=Limit(LATENCY, "max_latency_p95_seconds", "95th percentile {}"),
    ),
    Metric(
        "error_rate", "error rate", "errors", lambda found: found.figures.error_rate, detail=None,
        limit=Limit(ERROR_RATE, "max_error_rate", "{} of the requests", default=MAX_ERROR_RATE),
    ),
    Metric(
        "peak_memory_bytes", "memory at the peak", "peak memory", lambda found: found.figures.peak_memory_bytes,
        unit="bytes", digits=0, detail=None, limit=Limit(MEMORY, "max_memory_bytes", "{} at the peak"),
    ),
)  # fmt: skip


def metrics(detail: Detail) -> tuple[Metric, ...]:
    """The metrics that are shown where there is so much room, in their order."""
    return tuple(item for item in METRICS if item.detail is not None and item.detail <= detail)


def limited_metrics() -> list[tuple[Metric, Limit]]:
    """The metrics that a gate looks at, each with its limit."""
    return [(item, item.limit) for item in METRICS if item.limit is not None]


def metric(key: str) -> Metric:
    """The metric with this key. Raises KeyError."""
    return {item.key: item for item in METRICS}[key]


def readings(evidence: Evidence, detail: Detail = Detail.PAGE) -> list[Reading]:
    """What was measured, of the metrics that are shown where there is so much room."""
    found = [item.reading(evidence) for item in metrics(detail)]
    return [item for item in found if item is not None]


def cells(evidence: Evidence | None, detail: Detail, missing: str = "") -> list[str]:
    """One cell a metric; `missing` where it was not measured. Their headings are `headings`."""
    found = {} if evidence is None else {item.metric.key: item.text for item in readings(evidence, detail)}
    return [found.get(item.key, missing) for item in metrics(detail)]


def headings(detail: Detail) -> list[str]:
    """Over the columns of `cells`."""
    return [item.short for item in metrics(detail)]


def figures_data(evidence: Evidence | None) -> dict[str, Any]:
    """All metrics that are shown somewhere, for JSON; None where one was not measured."""
    found = {} if evidence is None else {item.metric.key: item.data for item in readings(evidence)}
    return {item.key: found.get(item.key) for item in metrics(Detail.PAGE)}


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
        return [*cells(self.record, Detail.LIST), self.verdict.value]


def measure(runtime: Runtime, windows: Windows, baseline: Baseline, reporter: Reporter) -> Quality:
    """Run the artifact over the windows and compare.

    Raises VerifyError: the artifact's vocabulary is not the source's, or its logits are not finite.
    """
    import numpy as np

    from quantize.evaluate.baseline import Compressed, blocks, compress

    check_same_vocabulary(runtime.vocabulary, baseline.vocabulary, windows)
    if baseline.windows_hash != windows.hash:
        raise VerifyError("the baseline was made from other text than is measured now")
    kl, same, targets = [], [], []
    for row, block, following in blocks(runtime, windows, reporter, "reading the held-out text with the artifact"):
        rows = slice(row, row + len(block))
        tokens = baseline.tokens[rows]
        source = Compressed(baseline.distribution.chosen[rows], baseline.distribution.others[rows])
        shared = block[:, : baseline.vocabulary]
        kl.append(divergence(source, compress(shared, tokens)))
        same.append(shared.argmax(axis=1) == tokens[:, 0])
        targets.append(np.take_along_axis(block, following[:, None], axis=1)[:, 0])
    divergences, log_probs = np.concatenate(kl), np.concatenate(targets)
    ours, theirs = perplexity(log_probs), perplexity(baseline.target_log_probs)
    return Quality(
        perplexity=ours,
        source_perplexity=theirs,
        perplexity_ratio=ours / theirs,
        mean_kl=float(divergences.mean()),
        p99_kl=float(np.quantile(divergences, 0.99, method="inverted_cdf")),
        max_kl=float(divergences.max()),
        top_token_agreement=float(np.concatenate(same).mean()),
        predictions=len(log_probs),
        windows=len(windows.token_ids),
        window_tokens=windows.length,
        kl_is_exact=baseline.is_whole,
        text_name=windows.text_name,
        text_hash=windows.text_hash,
        windows_hash=windows.hash,
        runtime=runtime.name,
        runtime_version=runtime.version,
        source_runtime=baseline.runtime,
        source_runtime_version=baseline.version,
    )


def perplexity(target_log_probs: NDArray[np.float32]) -> float:
    """exp of the mean negative log-probability of the tokens that came; inf where that is no float any more."""
    import numpy as np

    mean = -float(target_log_probs.mean(dtype=np.float64))
    return math.exp(mean) if mean < 700 else math.inf


def divergence(source: Compressed, artifact: Compressed) -> NDArray[np.float64]:
    """KL(source || artifact) in nats, [rows]; never below 0."""
    import numpy as np

    mine, other = source.chosen.astype(np.float64), artifact.chosen.astype(np.float64)
    possible = np.isfinite(mine)  # a token that can't come adds nothing; one that only the artifact rules out, infinity
    terms = np.where(possible, np.exp(mine) * (np.where(possible, mine, 0.0) - np.where(possible, other, 0.0)), 0.0)
    total: NDArray[np.float64] = terms.sum(axis=1)
    rest = np.isfinite(source.others)
    if rest.any():
        left, right = source.others[rest].astype(np.float64), artifact.others[rest].astype(np.float64)
        total[rest] += np.exp(left) * (left - right)
    return np.maximum(total, 0.0)


def check_same_vocabulary(artifact: int, source: int, windows: Windows) -> None:
    """Raise VerifyError unless both models have the same tokens; the artifact's table may be padded.

    Converters and packers round the vocabulary up for speed; a smaller one than the source's has lost tokens.
    """
    if source <= artifact <= source + max(512, source // 50):
        return
    used = max(max(ids) for ids in windows.token_ids)
    hint = "is this an artifact of another model?" if used < artifact else f"the text needs token {used}"
    raise VerifyError(
        f"the artifact knows {artifact:,} tokens and its source {source:,}: they can't be compared", hint=hint
    )
