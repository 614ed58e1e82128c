"""The production decision: figures against limits, what is missing, which artifact to serve, where to go back.

In: a Subject. Out: a Verdict for each entry, and a Choice. The rule is evaluate/decision.py's; here it is told about
serving too, and it asks for evidence of latency, errors and memory even where the recipe gives no limit for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from quantize.evaluate.decision import SERVING_LIMITS, Decision, Figures, Finding, Limits, decide
from quantize.evaluate.record import figures_of
from quantize.gates import UNQUANTIZED_SIZE_RATIO
from quantize.pages.collect import Entry, Subject

MAX_ERROR_RATE = 0.01
"""Failed requests that production stands where the recipe does not say: one in a hundred."""


@dataclass(frozen=True)
class Verdict:
    """What the rule says of one artifact."""

    entry: Entry
    decision: Decision
    figures: Figures
    limits: Limits

    @property
    def word(self) -> str:
        """ "refused", "insufficient evidence", "accepted with flags" or "accepted"."""
        return self.decision.verdict

    @property
    def usable(self) -> bool:
        """Whether it may be served."""
        return self.word.startswith("accepted")


@dataclass(frozen=True)
class Choice:
    """Which artifact to serve, and the one to fall back on; None where there is none."""

    serve: Verdict | None
    fallback: Verdict | None
    verdicts: tuple[Verdict, ...]


def judge(subject: Subject) -> Choice:
    """A verdict on every entry. The smallest that is accepted is to be served; the next one up is the way back."""
    verdicts = tuple(_verdict(entry, subject.gates) for entry in subject.entries)
    usable = sorted(
        (item for item in verdicts if item.usable), key=lambda item: item.entry.artifact.manifest.size_bytes
    )
    serve = usable[0] if usable else None
    return Choice(serve, usable[1] if len(usable) > 1 else None, verdicts)


def _verdict(entry: Entry, gates: Mapping[str, Any]) -> Verdict:
    limits, figures = limits_of(entry, gates), figures_with_serving(entry)
    findings = [*decide(figures, limits).findings, *_serving(figures, limits)]
    decision = Decision(tuple(_accepted_risk(entry, _under_load(entry, finding)) for finding in findings))
    return Verdict(entry, decision, figures, limits)


def limits_of(entry: Entry, gates: Mapping[str, Any]) -> Limits:
    """The limits that the evaluation was held against, with the recipe's own for serving; the defaults elsewhere."""
    known = {item.name for item in fields(Limits)}
    recorded = (entry.evaluation or {}).get("limits")
    if isinstance(recorded, Mapping):
        limits = Limits(**{name: value for name, value in recorded.items() if name in known})
    else:
        limits = Limits().with_gates(gates)
        if (entry.artifact.manifest.bits or 0) >= 16 and gates.get("max_size_ratio") is None:
            limits = replace(limits, max_size_ratio=UNQUANTIZED_SIZE_RATIO)
    serving = {name: gates[name] for name in SERVING_LIMITS if gates.get(name) is not None}
    limits = replace(limits, **serving)
    return limits if limits.max_error_rate is not None else replace(limits, max_error_rate=MAX_ERROR_RATE)


def figures_with_serving(entry: Entry) -> Figures:
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


def _serving(figures: Figures, limits: Limits) -> Iterator[Finding]:
    """Findings where the recipe gives no limit: the rule itself is silent there."""
    if limits.max_latency_p95_seconds is None:
        yield _no_limit("latency", figures.latency_p95_seconds, "95th percentile {:.3f} s", "max_latency_p95_seconds")
    if limits.max_memory_bytes is None:
        yield _no_limit("memory", figures.peak_memory_bytes, "{:,} bytes at the peak", "max_memory_bytes")


def _under_load(entry: Entry, finding: Finding) -> Finding:
    """The finding with what its figure was measured under: which load was the slowest, whose memory it is."""
    bench = entry.bench
    if bench is None or finding.outcome == "insufficient evidence":
        return finding
    if finding.gate == "latency" and bench.slowest is not None:
        return replace(finding, reason=f"{finding.reason} ({bench.slowest.shape} {bench.slowest.load})")
    if finding.gate == "memory":
        return replace(finding, reason=f"{finding.reason} ({'GPU' if bench.vram else 'RAM'})")
    return finding


def _no_limit(gate: str, value: float | None, shown: str, key: str) -> Finding:
    if value is None:
        return Finding(gate, "insufficient evidence", f"no {gate} was measured: run `quantize bench`")
    return Finding(gate, "passed", f"{shown.format(value)}; the recipe gives no `{key}`")


def _accepted_risk(entry: Entry, finding: Finding) -> Finding:
    """A refusal that whoever built the artifact took upon themselves is a flag, with their reason."""
    risk = entry.artifact.manifest.accepted_risk
    if risk is None or finding.outcome != "refused" or finding.gate not in risk.gates:
        return finding
    return Finding(finding.gate, "flagged", f"{finding.reason}; accepted all the same: {risk.reason}")
