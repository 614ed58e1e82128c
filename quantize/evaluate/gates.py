"""The decision rule: measured figures against limits -> what is refused, what is flagged, what was not measured.

In: Figures (None where something was not measured) and GateThresholds. Out: a Decision with one Finding a gate, each
with its numbers. Pure functions: nothing is measured, read or written here.

Default limits and why:
- mean KL divergence 0.05 nats: Q8_0 of the demo model measured 0.004, Q4_K_M 0.056, and that one answers a question for
  the capital of France in broken French. Text that looks right is lost between the two.
- perplexity ratio 1.05: the same files measured 1.004 and 1.084; what is published for 4-bit builds of 7B models is
  1.01 to 1.05, so a larger loss is more than the bits have to cost.
- golden prompts: 95 % of what the source passes, and of its JSON answers nine in ten. Single answers flip by rounding
  alone: with Q8_0 the demo model's "Paris" hangs on whether flash attention is on. So the default limit refuses only
  what chance does not explain (a sign test of lost against gained prompts, 5 %), and flags the rest; a limit that a
  recipe sets itself is taken at its word.
- size below the source's: or there is no point.
- perplexity better than the source's by over 5 % is flagged, not praised: it is a wrong baseline, wrong text, or text
  that was calibrated on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from typing import Any, Literal

from quantize.errors import GateError

Outcome = Literal["passed", "refused", "flagged", "insufficient evidence"]
MIN_GOLDEN_PASSES = 5
"""A source that passes fewer prompts says nothing about what was lost."""
SIGNIFICANCE = 0.05
SERVING_LIMITS = ("max_latency_p95_seconds", "max_error_rate", "max_memory_bytes")
"""Limits on what a load test measures, which a build does not run."""


@dataclass(frozen=True)
class GateThresholds:
    """What an artifact must keep; latency, error rate and memory are only looked at where a limit is given."""

    max_kl: float = 0.05
    max_perplexity_ratio: float = 1.05
    min_golden_pass_rate: float = 0.95
    max_json_loss: float = 0.10
    max_size_ratio: float = 1.0
    max_gain: float = 0.05
    max_latency_p95_seconds: float | None = None
    max_error_rate: float | None = None
    max_memory_bytes: int | None = None
    golden_beyond_chance: bool = True

    def with_gates(self, gates: Mapping[str, Any]) -> GateThresholds:
        """These limits with those of a recipe's `gates` in their place; None keeps the default."""
        known = {item.name for item in fields(self)}
        given = {name: value for name, value in gates.items() if name in known and value is not None}
        if "min_golden_pass_rate" in given:
            given.setdefault("golden_beyond_chance", False)
        return replace(self, **given)


@dataclass(frozen=True)
class Figures:
    """What was measured. checks: what must simply hold, by name, with what is wrong; "" where it holds."""

    mean_kl: float | None = None
    perplexity_ratio: float | None = None
    golden_source_passed: int | None = None
    golden_artifact_passed: int | None = None
    golden_prompts: int | None = None
    golden_lost: int | None = None
    json_source_passed: int | None = None
    json_lost: int | None = None
    size_bytes: int | None = None
    source_bytes: int | None = None
    latency_p95_seconds: float | None = None
    error_rate: float | None = None
    peak_memory_bytes: int | None = None
    checks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One gate: what came out, and a sentence with the numbers."""

    gate: str
    outcome: Outcome
    reason: str


@dataclass(frozen=True)
class Decision:
    """All findings. accepted: nothing is refused. verdict: also says so where evidence is missing."""

    findings: tuple[Finding, ...]

    @property
    def accepted(self) -> bool:
        """Whether no gate refuses; missing evidence does not refuse, but is said."""
        return not self.refusals

    @property
    def refusals(self) -> tuple[Finding, ...]:
        """The gates that refuse."""
        return self._having("refused")

    @property
    def missing(self) -> tuple[Finding, ...]:
        """The gates without evidence."""
        return self._having("insufficient evidence")

    @property
    def flags(self) -> tuple[Finding, ...]:
        """What a person should look at."""
        return self._having("flagged")

    @property
    def verdict(self) -> str:
        """ "refused", "insufficient evidence", "accepted with flags" or "accepted"."""
        if self.refusals:
            return "refused"
        if self.missing:
            return "insufficient evidence"
        return "accepted with flags" if self.flags else "accepted"

    def raise_if_refused(self, subject: str) -> None:
        """Raise GateError that names every broken limit with its numbers."""
        if self.refusals:
            reasons = "; ".join(f"{item.gate}: {item.reason}" for item in self.refusals)
            raise GateError(
                f"{subject} is refused: {reasons}",
                hint="use more bits or another method, or loosen `gates` in the recipe and say why",
            )

    def _having(self, outcome: Outcome) -> tuple[Finding, ...]:
        return tuple(item for item in self.findings if item.outcome == outcome)


def decide(figures: Figures, limits: GateThresholds) -> Decision:
    """Hold the figures against the limits."""
    return Decision(tuple(_findings(figures, limits)))


def _findings(figures: Figures, limits: GateThresholds) -> Iterator[Finding]:
    for name, problem in sorted(figures.checks.items()):
        yield Finding(name, "refused" if problem else "passed", problem or "holds")
    yield _at_most("KL divergence", figures.mean_kl, limits.max_kl, "mean {:.4f} nats", "no KL divergence")
    yield _perplexity(figures.perplexity_ratio, limits)
    yield _golden(figures, limits)
    yield _json(figures, limits)
    yield _size(figures, limits)
    if limits.max_latency_p95_seconds is not None:
        limit = limits.max_latency_p95_seconds
        yield _at_most("latency", figures.latency_p95_seconds, limit, "95th percentile {:.3f} s", "no latency")
    if limits.max_error_rate is not None:
        limit = limits.max_error_rate
        yield _at_most("error rate", figures.error_rate, limit, "{:.4f} of the requests", "no error rate")
    if limits.max_memory_bytes is not None:
        limit = limits.max_memory_bytes
        yield _at_most("memory", figures.peak_memory_bytes, limit, "{:,} bytes at the peak", "no memory")


def _at_most(gate: str, value: float | None, limit: float, shown: str, nothing: str) -> Finding:
    if value is None:
        return Finding(gate, "insufficient evidence", f"{nothing} was measured")
    number = shown.format(value)
    bound = f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"
    if value <= limit:  # false for NaN as well, which is refused
        return Finding(gate, "passed", f"{number}, the limit is {bound}")
    return Finding(gate, "refused", f"{number} is over the limit of {bound}")


def _perplexity(ratio: float | None, limits: GateThresholds) -> Finding:
    found = _at_most("perplexity", ratio, limits.max_perplexity_ratio, "{:.4f} times the source's", "no perplexity")
    if found.outcome == "passed" and ratio is not None and ratio < 1 - limits.max_gain:
        reason = f"{ratio:.4f} times the source's: a gain of over {limits.max_gain:.0%} is not plausible; "
        return Finding("perplexity", "flagged", reason + "check the baseline and whether the text was calibrated on")
    return found


def _golden(figures: Figures, limits: GateThresholds) -> Finding:
    source, artifact = figures.golden_source_passed, figures.golden_artifact_passed
    if source is None or artifact is None:
        return Finding("golden prompts", "insufficient evidence", "no golden prompts were asked")
    of = f" of {figures.golden_prompts}" if figures.golden_prompts is not None else ""
    if source < MIN_GOLDEN_PASSES:
        reason = f"the source itself passes only {source}{of}; {MIN_GOLDEN_PASSES} are needed to tell a loss"
        return Finding("golden prompts", "insufficient evidence", reason)
    rate = artifact / source
    counts = f"passes {artifact}{of}, the source passes {source}{of}"
    if rate >= limits.min_golden_pass_rate:
        needed = f"at least {limits.min_golden_pass_rate:.0%} of the source's are needed"
        return Finding("golden prompts", "passed", f"{counts}; {needed}")
    counts += f": {rate:.0%} is under the limit of {limits.min_golden_pass_rate:.0%}"
    lost = source - artifact if figures.golden_lost is None else figures.golden_lost
    chance = sign_test(lost, lost - (source - artifact))
    if limits.golden_beyond_chance and chance >= SIGNIFICANCE:
        reason = f"{counts}, but {lost} lost and {lost - source + artifact} gained may be chance (p = {chance:.2f})"
        return Finding("golden prompts", "flagged", f"{reason}: read them, or ask more")
    return Finding("golden prompts", "refused", counts)


def sign_test(lost: int, gained: int) -> float:
    """Probability that at least `lost` of the changed answers are losses if losses and gains were equally likely."""
    changed = lost + max(0, gained)
    ways = at_least = math.comb(changed, lost)
    for k in range(lost, changed):
        ways = ways * (changed - k) // (k + 1)
        at_least += ways
    return float(Fraction(at_least, 2**changed))


def _json(figures: Figures, limits: GateThresholds) -> Finding:
    passed, lost = figures.json_source_passed, figures.json_lost
    if not passed or lost is None:
        nothing = "no JSON prompt was asked" if passed is None else "the source itself passes no JSON prompt"
        return Finding("JSON answers", "insufficient evidence", nothing)
    counts = f"{lost} of the source's {passed} good JSON answers are lost ({lost / passed:.0%})"
    if lost / passed <= limits.max_json_loss:
        return Finding("JSON answers", "passed", f"{counts}, the limit is {limits.max_json_loss:.0%}")
    return Finding("JSON answers", "refused", f"{counts}, over the limit of {limits.max_json_loss:.0%}")


def _size(figures: Figures, limits: GateThresholds) -> Finding:
    if not figures.size_bytes or not figures.source_bytes:
        return Finding("size", "insufficient evidence", "the sizes are not known")
    ratio = figures.size_bytes / figures.source_bytes
    counts = f"{figures.size_bytes:,} of {figures.source_bytes:,} bytes, {ratio:.3f} times the source"
    if ratio < limits.max_size_ratio:
        return Finding("size", "passed", counts)
    return Finding("size", "refused", f"{counts}; it must be under {limits.max_size_ratio:g}")
