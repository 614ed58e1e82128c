"""The production decision: figures against limits, what is missing, which artifact to serve, where to go back.

In: a PageSubject. Out: a ServingVerdict for each entry, and a Choice. evaluate/gates.py holds the limits; here the
figures of a load test are added. They are required only where the recipe sets a limit on them: otherwise what was
measured is shown, and what was not is stated beside the decision.

Which artifact: the gates have already said what loss is acceptable, so the smallest accepted one wins. A few percent of
size make no difference to whoever runs it, though, and within them the lower divergence wins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from quantize.build.judge import UNQUANTIZED_SIZE_RATIO
from quantize.evaluate.gates import SERVING_LIMITS, Decision, Figures, Finding, GateThresholds, decide
from quantize.evaluate.record import figures_of
from quantize.report.collect import MeasuredArtifact, PageSubject

MAX_ERROR_RATE = 0.01
"""Failed requests that production stands where the recipe does not say: one in a hundred of those measured."""
SAME_SIZE = 0.05
"""Files that are larger by at most this share of the smallest are as good as equal in size."""
SERVING = ("latency", "error rate", "memory")
"""Gates whose figures a load test measures."""


@dataclass(frozen=True)
class ServingVerdict:
    """What the rule says of one artifact."""

    entry: MeasuredArtifact
    decision: Decision
    figures: Figures
    limits: GateThresholds

    @property
    def word(self) -> str:
        """ "refused", "insufficient evidence", "accepted with flags" or "accepted"."""
        return self.decision.verdict

    @property
    def usable(self) -> bool:
        """Whether it may be served."""
        return self.word.startswith("accepted")

    @property
    def not_measured(self) -> tuple[str, ...]:
        """Figures of a load test that are not there, and that no limit asks for."""
        known = {finding.gate for finding in self.decision.findings}
        return tuple(name for name in SERVING if name not in known)

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return self.entry.artifact.manifest.size_bytes

    @property
    def divergence(self) -> float:
        """Mean KL divergence in nats; infinite where it is unknown, or no number."""
        value = self.figures.mean_kl
        return math.inf if value is None or math.isnan(value) else value


@dataclass(frozen=True)
class Choice:
    """Which artifact to serve, and the one to fall back on; None where there is none.

    usable: the accepted ones by size. verdicts: all, in the subject's order.
    """

    serve: ServingVerdict | None
    fallback: ServingVerdict | None
    usable: tuple[ServingVerdict, ...]
    verdicts: tuple[ServingVerdict, ...]


def judge(subject: PageSubject) -> Choice:
    """A verdict on every entry, and the choice among those that are accepted."""
    verdicts = tuple(_verdict(entry, subject.gates) for entry in subject.entries)
    usable = tuple(sorted((item for item in verdicts if item.usable), key=lambda item: item.size_bytes))
    serve = _to_serve(usable)
    return Choice(serve, _way_back(serve, usable) if serve else None, usable, verdicts)


def _to_serve(usable: Sequence[ServingVerdict]) -> ServingVerdict | None:
    """Of the smallest and those of about its size, the one that diverges least; the smallest of equals."""
    if not usable:
        return None
    largest = usable[0].size_bytes * (1 + SAME_SIZE)
    return min((item for item in usable if item.size_bytes <= largest), key=lambda item: item.divergence)


def _way_back(serve: ServingVerdict, usable: Sequence[ServingVerdict]) -> ServingVerdict | None:
    """The smallest one that is larger than what is served and diverges no more."""
    above = usable[usable.index(serve) + 1 :]
    return next((item for item in above if item.divergence <= serve.divergence), None)


def _verdict(entry: MeasuredArtifact, gates: Mapping[str, Any]) -> ServingVerdict:
    limits, figures = limits_of(entry, gates), figures_with_serving(entry)
    if limits.max_error_rate is None and entry.bench is not None:
        limits = replace(limits, max_error_rate=MAX_ERROR_RATE)
    findings = [*decide(figures, limits).findings, *_serving(figures, limits)]
    decision = Decision(tuple(_accepted_risk(entry, _under_load(entry, finding)) for finding in findings))
    return ServingVerdict(entry, decision, figures, limits)


def limits_of(entry: MeasuredArtifact, gates: Mapping[str, Any]) -> GateThresholds:
    """The limits that the evaluation was held against, and the recipe's own for serving; the defaults elsewhere."""
    known = {item.name for item in fields(GateThresholds)}
    recorded = (entry.evaluation or {}).get("limits")
    if isinstance(recorded, Mapping):
        limits = GateThresholds(**{name: value for name, value in recorded.items() if name in known})
    else:
        limits = GateThresholds().with_gates(gates)
        if (entry.artifact.manifest.bits or 0) >= 16 and gates.get("max_size_ratio") is None:
            limits = replace(limits, max_size_ratio=UNQUANTIZED_SIZE_RATIO)
    serving = {name: gates[name] for name in SERVING_LIMITS if gates.get(name) is not None}
    return replace(limits, **serving)


def figures_with_serving(entry: MeasuredArtifact) -> Figures:
    """All that was measured: of the evaluation and of the bench. Latency is that of the slowest cell."""
    manifest, bench = entry.artifact.manifest, entry.bench
    if entry.evaluation is not None and isinstance(entry.evaluation.get("figures"), Mapping):
        figures = figures_of(entry.evaluation)
    else:
        weights = manifest.estimate.get("weights_bytes", manifest.size_bytes)
        figures = Figures(size_bytes=weights, source_bytes=manifest.source.weights_bytes)
    if bench is None:
        return figures
    slowest = bench.slowest
    return replace(
        figures,
        latency_p95_seconds=slowest.latency.p95 if slowest and slowest.latency else None,
        error_rate=bench.error_rate,
        peak_memory_bytes=bench.peak_bytes,
    )


def _serving(figures: Figures, limits: GateThresholds) -> Iterator[Finding]:
    """What was measured and has no limit, of which the rule itself says nothing."""
    latency, memory = figures.latency_p95_seconds, figures.peak_memory_bytes
    if limits.max_latency_p95_seconds is None and latency is not None:
        shown = f"95th percentile {latency:.3f} s"
        yield Finding("latency", "passed", f"{shown}; the recipe gives no `max_latency_p95_seconds`")
    if limits.max_memory_bytes is None and memory is not None:
        yield Finding("memory", "passed", f"{memory:,} bytes at the peak; the recipe gives no `max_memory_bytes`")


def _under_load(entry: MeasuredArtifact, finding: Finding) -> Finding:
    """The finding with what its figure was measured under: which load was the slowest, whose memory it is."""
    bench = entry.bench
    if bench is None or finding.outcome == "insufficient evidence":
        return finding
    if finding.gate == "latency" and bench.slowest is not None:
        return replace(finding, reason=f"{finding.reason} ({bench.slowest.shape} {bench.slowest.load})")
    if finding.gate == "memory":
        return replace(finding, reason=f"{finding.reason} ({'GPU' if bench.vram else 'RAM'})")
    return finding


def _accepted_risk(entry: MeasuredArtifact, finding: Finding) -> Finding:
    """A refusal that whoever built the artifact took upon themselves is a flag, with their reason."""
    risk = entry.artifact.manifest.accepted_risk
    if risk is None or finding.outcome != "refused" or finding.gate not in risk.gates:
        return finding
    return Finding(finding.gate, "flagged", f"{finding.reason}; accepted all the same: {risk.reason}")
