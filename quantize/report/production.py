"""The production decision: figures against limits, what is missing, which artifact to serve, where to go back.

In: a PageSubject. Out: a ServingVerdict for each entry, and a Choice. evaluate/gates.py holds the limits; here the
figures of a load test are added. They are required only where the recipe sets a limit on them: otherwise what was
measured is shown, and what was not is stated beside the decision.

Which artifact is evaluate/front.py's to say, among those that are accepted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantize.evaluate.comparison import Comparison, Entrant, compare
from quantize.evaluate.decision import Decision, Finding, GateOutcome, GateThresholds, Verdict
from quantize.evaluate.front import divergence
from quantize.evaluate.gates import MeasuredBy, decide, gates, thresholds, with_load
from quantize.evaluate.metrics import LATENCY, MEMORY
from quantize.evaluate.record import Evidence, Figures, Quality
from quantize.recipe.gates import GateLimits
from quantize.report.collect import MeasuredArtifact, PageSubject


@dataclass(frozen=True)
class ServingVerdict:
    """What the rule says of one artifact."""

    entry: MeasuredArtifact
    decision: Decision
    evidence: Evidence
    limits: GateThresholds

    @property
    def word(self) -> Verdict:
        """What all gates together say."""
        return self.decision.verdict

    @property
    def usable(self) -> bool:
        """Whether it may be served."""
        return self.word.is_accepted

    @property
    def not_measured(self) -> tuple[str, ...]:
        """Figures of a load test that are not there, and that no limit asks for."""
        known = {finding.gate for finding in self.decision.findings}
        return tuple(gate.name for gate in gates() if gate.measured_by is MeasuredBy.LOAD and gate.name not in known)

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return self.entry.artifact.manifest.size_bytes

    @property
    def variant(self) -> str:
        """Its name in the recipe."""
        return self.entry.variant

    @property
    def quality(self) -> Quality | None:
        """Figures against the source; None if there are none."""
        return self.evidence.quality


@dataclass(frozen=True)
class Choice:
    """Which artifact to serve, and the one to fall back on; None where there is none.

    usable: the accepted ones by size. verdicts: all, in the subject's order. comparison: of all of them.
    """

    serve: ServingVerdict | None
    fallback: ServingVerdict | None
    usable: tuple[ServingVerdict, ...]
    verdicts: tuple[ServingVerdict, ...]
    comparison: Comparison


def judge(subject: PageSubject) -> Choice:
    """A verdict on every entry, and the choice among those that are accepted."""
    verdicts = tuple(_verdict(entry, subject.gates) for entry in subject.entries)
    usable = tuple(sorted((item for item in verdicts if item.usable), key=lambda item: item.size_bytes))
    limits = next((item.limits for item in verdicts if item.quality is not None), None)
    entrants = [Entrant.of(item.entry.artifact.manifest, item.word, item.quality) for item in verdicts]
    comparison = compare(entrants, limits)
    serve = next((item for item in usable if item.entry.artifact.manifest.digest == comparison.taken), None)
    return Choice(serve, _way_back(serve, usable) if serve else None, usable, verdicts, comparison)


def _way_back(serve: ServingVerdict, usable: Sequence[ServingVerdict]) -> ServingVerdict | None:
    """The smallest one that is larger than what is served and diverges no more."""
    above = usable[usable.index(serve) + 1 :]
    return next((item for item in above if divergence(item) <= divergence(serve)), None)


def _verdict(entry: MeasuredArtifact, given: GateLimits) -> ServingVerdict:
    limits, evidence = limits_of(entry, given), with_serving(entry)
    findings = decide(evidence, limits).findings
    decision = Decision(tuple(_accepted_risk(entry, _under_load(entry, finding)) for finding in findings))
    return ServingVerdict(entry, decision, evidence, limits)


def limits_of(entry: MeasuredArtifact, given: GateLimits) -> GateThresholds:
    """The limits that the evaluation was held against, and the recipe's own for serving; the defaults elsewhere."""
    evaluation, bits = entry.evaluation, entry.artifact.manifest.bits
    limits = thresholds(given, bits) if evaluation is None else evaluation.limits
    return with_load(limits, given, measured=entry.bench is not None)


def with_serving(entry: MeasuredArtifact) -> Evidence:
    """All that was measured: of the evaluation and of the bench. Latency is that of the slowest cell."""
    manifest, bench = entry.artifact.manifest, entry.bench
    evidence: Evidence | None = entry.evaluation
    if evidence is None:
        evidence = Evidence(
            figures=Figures(size_bytes=manifest.weights_bytes, source_bytes=manifest.source.weights_bytes)
        )
    if bench is None:
        return evidence
    slowest = bench.slowest
    load = {
        "latency_p95_seconds": slowest.latency.p95 if slowest and slowest.latency else None,
        "error_rate": bench.error_rate,
        "peak_memory_bytes": bench.peak_bytes,
    }
    return evidence.model_copy(update={"figures": evidence.figures.model_copy(update=load)})


def _under_load(entry: MeasuredArtifact, finding: Finding) -> Finding:
    """The finding with what its figure was measured under: which load was the slowest, whose memory it is."""
    bench = entry.bench
    if bench is None or finding.outcome is GateOutcome.INSUFFICIENT:
        return finding
    if finding.gate == LATENCY and bench.slowest is not None:
        return _told(finding, f" ({bench.slowest.shape} {bench.slowest.load})")
    if finding.gate == MEMORY:
        return _told(finding, f" ({'GPU' if bench.vram else 'RAM'})")
    return finding


def _accepted_risk(entry: MeasuredArtifact, finding: Finding) -> Finding:
    """A refusal that whoever built the artifact took upon themselves is a flag, with their reason."""
    risk = entry.artifact.manifest.accepted_risk
    if risk is None or finding.outcome is not GateOutcome.REFUSED or finding.gate not in risk.gates:
        return finding
    flagged = finding.model_copy(update={"outcome": GateOutcome.FLAGGED})
    return _told(flagged, f"; accepted all the same: {risk.reason}")


def _told(finding: Finding, more: str) -> Finding:
    return finding.model_copy(update={"reason": finding.reason + more})
