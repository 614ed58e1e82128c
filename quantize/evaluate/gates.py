"""The decision rule: what was measured against limits -> what is refused, what is flagged, what was not measured.

In: Evidence (None where something was not measured) and GateThresholds. Out: a Decision with one Finding a gate, each
with its numbers. Pure functions: nothing is measured, read or written here. The default limits and their reasons are
recipe/gates.py's; a metric that has a limit in metrics.py is a gate here by that alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from fractions import Fraction

from quantize.evaluate.decision import Decision, Finding, GateOutcome, GateThresholds
from quantize.evaluate.metric import Better, KindReading, Limit, Metric, Reading
from quantize.evaluate.metrics import limited_metrics
from quantize.evaluate.record import Evidence, GoldenCount
from quantize.evaluate.task_record import TaskMetric
from quantize.evaluate.task_table import difference_text
from quantize.recipe.gates import MAX_ERROR_RATE, MAX_UNQUANTIZED_SIZE_RATIO, SERVING_LIMITS, GateLimits

MIN_GOLDEN_PASSES = 5
"""A source that passes fewer prompts says nothing about what was lost."""
SIGNIFICANCE = 0.05
TASK_SCORES = "task scores"


class MeasuredBy(Enum):
    """What gives a gate its evidence."""

    EVALUATION = auto()
    PROMPTS = auto()
    """An evaluation, by a recipe that has prompts which the source can answer."""
    LOAD = auto()


@dataclass(frozen=True)
class Gate:
    """One gate. name: of its findings. title: of its limit, whose key in a recipe is `key`.

    bound: the limit in words. rule: what it says; None for what was not measured and nobody set a limit on.
    """

    name: str
    title: str
    key: str
    measured_by: MeasuredBy
    bound: Callable[[GateThresholds], str]
    rule: Callable[[Evidence, GateThresholds], Finding | None]

    def is_set(self, limits: GateThresholds) -> bool:
        """Whether there is a limit at all."""
        return getattr(limits, self.key) is not None


def thresholds(gates: GateLimits, bits: int | None) -> GateThresholds:
    """The limits of an evaluation: a recipe's where it sets them, else the defaults. Those on load are left out.

    bits: of the artifact's weights. A golden pass rate that the recipe sets is taken at its word.
    """
    given = gates.model_dump(include=gates.model_fields_set - set(SERVING_LIMITS))
    given.setdefault("max_conversion_kl", gates.max_conversion_kl)
    if "min_golden_pass_rate" in given:
        given["golden_beyond_chance"] = False
    if bits is not None and bits >= 16:
        given.setdefault("max_size_ratio", MAX_UNQUANTIZED_SIZE_RATIO)
    return GateThresholds(**given)


def with_load(limits: GateThresholds, gates: GateLimits, *, measured: bool) -> GateThresholds:
    """The limits with those of a recipe on load. measured: there is a load, so that the default on errors holds."""
    given = {key: value for key in SERVING_LIMITS if (value := getattr(gates, key)) is not None}
    if measured:
        given.setdefault("max_error_rate", error_rate_limit(limits))
    return limits.model_copy(update=given)


def error_rate_limit(limits: GateThresholds) -> float:
    """Failed requests that are stood, as a share of all: the default where no limit is set."""
    return MAX_ERROR_RATE if limits.max_error_rate is None else limits.max_error_rate


def gates() -> tuple[Gate, ...]:
    """Every gate, in the order of the limits that a recipe may set."""
    found = {item.key: item for item in (*_OWN_RULES, *(_of_metric(*item) for item in limited_metrics()))}
    known = [key for key in GateLimits.model_fields if key in found]
    return tuple(found[key] for key in [*known, *(key for key in found if key not in known)])


def decide(evidence: Evidence, limits: GateThresholds) -> Decision:
    """Hold what was measured against the limits."""
    return Decision(tuple(_findings(evidence, limits)))


def _findings(evidence: Evidence, limits: GateThresholds) -> Iterator[Finding]:
    for name, problem in sorted(evidence.figures.checks.items()):
        yield _refused(name, problem) if problem else _passed(name, "holds")
    for gate in gates():
        finding = gate.rule(evidence, limits)
        if finding is not None:
            yield finding


def _passed(gate: str, reason: str) -> Finding:
    return Finding(gate=gate, outcome=GateOutcome.PASSED, reason=reason)


def _refused(gate: str, reason: str) -> Finding:
    return Finding(gate=gate, outcome=GateOutcome.REFUSED, reason=reason)


def _flagged(gate: str, reason: str) -> Finding:
    return Finding(gate=gate, outcome=GateOutcome.FLAGGED, reason=reason)


def _insufficient(gate: str, reason: str) -> Finding:
    return Finding(gate=gate, outcome=GateOutcome.INSUFFICIENT, reason=reason)


# --- metrics with a limit ---------------------------------------------------------------------------------------------


def _of_metric(metric: Metric, limit: Limit) -> Gate:
    serving = limit.key in SERVING_LIMITS
    most = "at most" if metric.better is Better.LOWER else "at least"

    def bound(limits: GateThresholds) -> str:
        value = getattr(limits, limit.key)
        if value is None and limit.default is not None:
            return f"{most} {_limit_text(limit.default)}, where it was measured"
        if value is None:
            return "no limit given"
        return f"{most} {_limit_text(value)} {metric.unit}".strip()

    def rule(evidence: Evidence, limits: GateThresholds) -> Finding | None:
        reading, border = metric.reading(evidence), getattr(limits, limit.key)
        if reading is None and limit.optional:
            return None
        if reading is None or isinstance(reading.value, GoldenCount):
            return None if border is None else _insufficient(limit.gate, f"no {limit.gate} was measured")
        if border is None:
            number = limit.says.format(reading.text_with_unit)
            return _passed(limit.gate, f"{number}; the recipe gives no `{limit.key}`")
        return _worst([_on_text(metric, limit, reading, item, border, limits) for item in reading.each])

    return Gate(limit.gate, metric.title, limit.key, MeasuredBy.LOAD if serving else MeasuredBy.EVALUATION, bound, rule)


def _on_text(
    metric: Metric, limit: Limit, reading: Reading, item: KindReading, border: float, limits: GateThresholds
) -> tuple[float, Finding]:
    """What the gate says of one kind of text, and how near the limit the figure is: over 1 is beyond it."""
    number = limit.says.format(f"{reading.kind_text(item)} {metric.unit}".strip())
    number += f" on {item.kind}" if item.kind else ""
    lower, value, said = metric.better is Better.LOWER, item.value, _limit_text(border)
    nearness = value / border if lower else border / max(value, 1e-30)
    beyond = not (value <= border if lower else value >= border)  # NaN is beyond any
    within = item.interval is not None and item.interval.low <= border <= item.interval.high
    if within and math.isfinite(value):
        reason = f"{number}: the limit of {said} lies within the interval; measure more text"
        return nearness, _flagged(limit.gate, reason)
    if beyond:
        return nearness, _refused(limit.gate, f"{number} is {'over' if lower else 'under'} the limit of {said}")
    doubt = limit.doubt(value, limits) if limit.doubt else ""
    if doubt:
        return nearness, _flagged(limit.gate, f"{number}: {doubt}")
    return nearness, _passed(limit.gate, f"{number}, the limit is {said}")


def _worst(found: Sequence[tuple[float, Finding]]) -> Finding:
    """The finding that decides: one that refuses, else one that flags; of those, the nearest to its limit."""
    order = (GateOutcome.REFUSED, GateOutcome.FLAGGED, GateOutcome.PASSED)
    return min(found, key=lambda item: (order.index(item[1].outcome), -item[0] if item[0] == item[0] else -math.inf))[1]


def _limit_text(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


# --- rules of their own -----------------------------------------------------------------------------------------------


def _golden(evidence: Evidence, limits: GateThresholds) -> Finding:
    gate, golden = "golden prompts", evidence.golden
    if golden is None:
        return _insufficient(gate, "no golden prompts were asked")
    source, artifact, of = golden.source_passed, golden.artifact_passed, f" of {golden.prompts}"
    if source < MIN_GOLDEN_PASSES:
        needed = f"{MIN_GOLDEN_PASSES} are needed to tell a loss"
        return _insufficient(gate, f"the source itself passes only {source}{of}; {needed}")
    rate = artifact / source
    counts = f"passes {artifact}{of}, the source passes {source}{of}"
    if rate >= limits.min_golden_pass_rate:
        return _passed(gate, f"{counts}; at least {limits.min_golden_pass_rate:.0%} of the source's are needed")
    counts += f": {rate:.0%} is under the limit of {limits.min_golden_pass_rate:.0%}"
    lost, gained = golden.lost, golden.lost - (source - artifact)
    chance = sign_test(lost, gained)
    if limits.golden_beyond_chance and chance >= SIGNIFICANCE:
        reason = f"{counts}, but {lost} lost and {gained} gained may be chance (p = {chance:.2f})"
        return _flagged(gate, f"{reason}: read them, or ask more")
    return _refused(gate, counts)


def sign_test(lost: int, gained: int) -> float:
    """Probability that at least `lost` of the changed answers are losses if losses and gains were equally likely."""
    changed = lost + max(0, gained)
    ways = at_least = math.comb(changed, lost)
    for k in range(lost, changed):
        ways = ways * (changed - k) // (k + 1)
        at_least += ways
    return float(Fraction(at_least, 2**changed))


def _json(evidence: Evidence, limits: GateThresholds) -> Finding:
    gate, golden = "JSON answers", evidence.golden
    passed, lost = (golden.json_source_passed, golden.json_lost) if golden else (None, None)
    if not passed or lost is None:
        nothing = "no JSON prompt was asked" if passed is None else "the source itself passes no JSON prompt"
        return _insufficient(gate, nothing)
    counts = f"{lost} of the source's {passed} good JSON answers are lost ({lost / passed:.0%})"
    if lost / passed <= limits.max_json_loss:
        return _passed(gate, f"{counts}, the limit is {limits.max_json_loss:.0%}")
    return _refused(gate, f"{counts}, over the limit of {limits.max_json_loss:.0%}")


def _tasks(evidence: Evidence, limits: GateThresholds) -> Finding | None:
    gate, limit = TASK_SCORES, limits.max_task_loss
    if limit is None:
        return None
    found = evidence.tasks.results if evidence.tasks is not None else ()
    shares = [(task.title, task.main_metric) for task in found if task.main_metric.is_share]
    if not shares:
        return _insufficient(gate, "no task was measured whose score is a share")
    return _worst([_of_task(title, metric, limit) for title, metric in shares])


def _of_task(title: str, metric: TaskMetric, limit: float) -> tuple[float, Finding]:
    """What the gate says of one task, and how near the limit its loss is."""
    scores = f"{metric.title} {metric.value:.1%}, the source {metric.source_value:.1%}, {difference_text(metric)}"
    said, lies, nearness = f"{title}: {scores}", metric.loss_interval, metric.loss / max(limit, 1e-30)
    if lies is None:
        return nearness, _flagged(TASK_SCORES, f"{said}: too few samples for an interval")
    if lies.low <= limit <= lies.high:
        reason = f"{said}: the limit of {100 * limit:g} points lies within the interval; measure more samples"
        return nearness, _flagged(TASK_SCORES, reason)
    if metric.loss > limit:
        return nearness, _refused(TASK_SCORES, f"{said}: over the limit of {100 * limit:g} points")
    return nearness, _passed(TASK_SCORES, f"{said}, the limit is {100 * limit:g} points lost")


def _task_bound(limits: GateThresholds) -> str:
    limit = limits.max_task_loss
    return "no limit given" if limit is None else f"at most {100 * limit:g} points lost on the worst task"


def _size(evidence: Evidence, limits: GateThresholds) -> Finding:
    gate, size, source = "size", evidence.figures.size_bytes, evidence.figures.source_bytes
    if not size or not source:
        return _insufficient(gate, "the sizes are not known")
    counts = f"{size:,} of {source:,} bytes, {size / source:.3f} times the source"
    if size / source < limits.max_size_ratio:
        return _passed(gate, counts)
    return _refused(gate, f"{counts}; it must be under {limits.max_size_ratio:g}")


def _golden_bound(limits: GateThresholds) -> str:
    chance = ", unless chance explains the loss" if limits.golden_beyond_chance else ""
    return f"at least {limits.min_golden_pass_rate:.0%} of what the source passes{chance}"


_OWN_RULES = (
    Gate("golden prompts", "golden prompts", "min_golden_pass_rate", MeasuredBy.PROMPTS, _golden_bound, _golden),
    Gate(
        "JSON answers", "JSON answers", "max_json_loss", MeasuredBy.PROMPTS,
        lambda limits: f"at most {limits.max_json_loss:.0%} of the source's good ones lost", _json,
    ),
    Gate(TASK_SCORES, "task scores", "max_task_loss", MeasuredBy.EVALUATION, _task_bound, _tasks),
    Gate(
        "size", "size", "max_size_ratio", MeasuredBy.EVALUATION,
        lambda limits: f"under {limits.max_size_ratio:g} times the source", _size,
    ),
)  # fmt: skip
