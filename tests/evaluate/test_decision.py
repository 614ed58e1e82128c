"""The decision rule on figures that were measured, and at its edges."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.build.settle import refusal
from quantize.errors import VerifyError
from quantize.evaluate.decision import NEAR, RUNS, Decision, GateThresholds, Verdict
from quantize.evaluate.gates import decide, sign_test, thresholds, with_load
from quantize.evaluate.record import Evidence, Figures, GoldenRecord, Interval
from quantize.recipe.gates import GateLimits
from quantize.store.artifact import Artifact
from tests.pages.measured import evaluation

PROMPTS = GoldenRecord(
    hash="", context=256, prompts=41, source_passed=20, artifact_passed=20, lost=0, json_source_passed=6, json_lost=0,
    results=(),
)  # fmt: skip
FIGURES = Figures(size_bytes=145, source_bytes=270, checks={"chat template kept": ""})
GOOD = Evidence(quality=evaluation(kl=0.004, ratio=1.004).quality, golden=PROMPTS, figures=FIGURES)
PARTS: dict[str, str] = {
    **dict.fromkeys(("mean_kl", "perplexity_ratio"), "quality"),
    **dict.fromkeys(("source_passed", "artifact_passed", "lost", "json_source_passed", "json_lost"), "golden"),
}
"""Which part of the evidence a value is in; all others are figures."""


def evidence(**changes: Any) -> Evidence:
    """What is good with other values, or with whole parts left out: quality=None."""
    found = GOOD
    for name, value in changes.items():
        part = PARTS.get(name, "figures")
        inner = value if name in ("quality", "golden") else getattr(found, part).model_copy(update={name: value})
        found = found.model_copy(update={name if name in ("quality", "golden") else part: inner})
    return found


def changed(**changes: Any) -> Decision:
    return decide(evidence(**changes), GateThresholds())


def test_what_is_good_is_accepted() -> None:
    decision = decide(GOOD, GateThresholds())
    assert decision.verdict is Verdict.ACCEPTED
    assert {item.outcome for item in decision.findings} == {"passed"}


@pytest.mark.parametrize(("name", "ratio", "kl"), [("Q4_K_M", 1.084, 0.056), ("Q5_K_M", 1.099, 0.071)])
def test_the_demo_model_s_small_files_are_refused_with_their_numbers(name: str, ratio: float, kl: float) -> None:
    decision = changed(perplexity_ratio=ratio, mean_kl=kl)
    assert not decision.accepted, name
    reasons = {item.gate: item.reason for item in decision.refusals}
    assert reasons["KL divergence"] == f"mean {kl:.4f} nats is over the limit of 0.05"
    assert reasons["perplexity"] == f"{ratio:.4f} times the source's is over the limit of 1.05"


@pytest.mark.parametrize(("ratio", "kl"), [(1.004, 0.004), (1.019, 0.02)])
def test_q8_and_int8_pass(ratio: float, kl: float) -> None:
    assert changed(perplexity_ratio=ratio, mean_kl=kl).accepted


@pytest.mark.parametrize(
    ("gate", "changes", "number"),
    [
        ("golden prompts", {"artifact_passed": 15, "lost": 5}, "passes 15 of 41, the source passes 20 of 41: 75%"),
        ("JSON answers", {"json_lost": 1}, "1 of the source's 6 good JSON answers are lost (17%)"),
        ("size", {"size_bytes": 270}, "270 of 270 bytes"),
        ("KL divergence", {"mean_kl": math.nan}, "nan"),
        ("perplexity", {"perplexity_ratio": math.inf}, "inf"),
        ("chat template kept", {"checks": {"chat template kept": "it is lost"}}, "it is lost"),
    ],
)
def test_each_gate_refuses_by_itself(gate: str, changes: dict[str, object], number: str) -> None:
    (refusal,) = changed(**changes).refusals
    assert refusal.gate == gate
    assert number in refusal.reason


@pytest.mark.parametrize(
    ("gates", "changes"),
    [
        ({"KL divergence", "perplexity"}, {"quality": None}),
        ({"golden prompts", "JSON answers"}, {"golden": None}),
        ({"golden prompts"}, {"source_passed": 4, "artifact_passed": 0}),
        ({"JSON answers"}, {"json_source_passed": 0}),
        ({"JSON answers"}, {"json_source_passed": None}),
        ({"size"}, {"source_bytes": None}),
    ],
)
def test_what_was_not_measured_is_said(gates: set[str], changes: dict[str, object]) -> None:
    decision = changed(**changes)
    assert {item.gate for item in decision.missing} == gates
    assert decision.accepted
    assert decision.verdict == "insufficient evidence"


def test_a_gain_that_is_too_good_is_flagged() -> None:
    decision = changed(perplexity_ratio=0.94)
    assert decision.verdict == "accepted with flags"
    assert "not plausible" in decision.flags[0].reason
    assert changed(perplexity_ratio=0.96).verdict == "accepted"


def test_a_refusal_outweighs_what_is_missing() -> None:
    assert changed(mean_kl=1.0, golden=None).verdict is Verdict.REFUSED


def test_serving_figures_count_where_a_limit_is_given() -> None:
    limits = GateThresholds(max_latency_p95_seconds=2.0, max_error_rate=0.01, max_memory_bytes=8 * 2**30)
    assert len(decide(GOOD, limits).missing) == 3
    slow = evidence(latency_p95_seconds=2.5, error_rate=0.1, peak_memory_bytes=2**30)
    assert [item.gate for item in decide(slow, limits).refusals] == ["latency", "error rate"]
    unlimited = [item for item in decide(slow, GateThresholds()).findings if item.gate == "latency"]
    assert [item.reason for item in unlimited] == [
        "95th percentile 2.500 s; the recipe gives no `max_latency_p95_seconds`"
    ]


def test_a_recipe_s_gates_take_the_place_of_the_defaults() -> None:
    gates = GateLimits.model_validate({"max_kl": 0.2, "max_perplexity_ratio": None, "max_error_rate": 0.5})
    limits = thresholds(gates, 4)
    assert (limits.max_kl, limits.max_perplexity_ratio, limits.max_size_ratio) == (0.2, 1.05, 1.0)
    assert limits.max_error_rate is None, "a build measures no load"
    assert with_load(limits, gates, measured=False).max_error_rate == 0.5


def test_what_is_not_quantized_may_be_as_large_as_its_source() -> None:
    assert thresholds(GateLimits(), 16).max_size_ratio == 1.1
    assert thresholds(GateLimits(), 8).max_size_ratio == 1.0
    assert thresholds(GateLimits(max_size_ratio=0.9), 16).max_size_ratio == 0.9


def test_errors_have_a_default_limit_where_a_load_was_measured() -> None:
    limits = thresholds(GateLimits(), None)
    assert with_load(limits, GateLimits(), measured=True).max_error_rate == 0.01
    assert with_load(limits, GateLimits(), measured=False).max_error_rate is None
    assert with_load(limits, GateLimits(max_error_rate=0.2), measured=True).max_error_rate == 0.2


@pytest.mark.parametrize(
    ("lost", "gained", "outcome"),
    [(1, 0, "passed"), (4, 0, "flagged"), (5, 0, "refused"), (6, 2, "flagged"), (8, 1, "refused")],
)
def test_a_few_lost_prompts_may_be_chance(lost: int, gained: int, outcome: str) -> None:
    decision = changed(artifact_passed=20 - lost + gained, lost=lost)
    (finding,) = [item for item in decision.findings if item.gate == "golden prompts"]
    assert finding.outcome == outcome


def test_a_recipe_s_own_rate_is_taken_at_its_word() -> None:
    limits = thresholds(GateLimits(min_golden_pass_rate=0.95), 4)
    measured = evidence(artifact_passed=18, lost=2)
    assert [item.gate for item in decide(measured, limits).refusals] == ["golden prompts"]
    assert decide(measured, GateThresholds()).accepted


def test_the_sign_test_by_hand() -> None:
    assert sign_test(5, 0) == 1 / 32
    assert sign_test(0, 0) == 1
    assert sign_test(1, 1) == 0.75


measured = st.builds(
    evidence,
    mean_kl=st.floats(),
    perplexity_ratio=st.floats(),
    source_passed=st.integers(0, 50),
    artifact_passed=st.integers(0, 50),
    lost=st.integers(0, 50),
    json_source_passed=st.none() | st.integers(0, 9),
    json_lost=st.none() | st.integers(0, 9),
    size_bytes=st.none() | st.integers(0, 10**12),
    source_bytes=st.none() | st.integers(0, 10**12),
    checks=st.dictionaries(st.text(min_size=1), st.text(), max_size=3),
)


@given(measured, st.sampled_from([{}, {"quality": None}, {"golden": None}, {"quality": None, "golden": None}]))
def test_every_figure_gets_a_sentence(found: Evidence, left_out: dict[str, None]) -> None:
    found = found.model_copy(update=left_out)
    decision = decide(found, GateThresholds())
    assert len(decision.findings) == 5 + len(found.figures.checks)
    assert all(item.reason for item in decision.findings)
    assert decision.accepted == (decision.verdict != "refused")


# --- intervals and kinds of text --------------------------------------------------------------------------------------


def on_kinds(**kl: tuple[float, float, float]) -> Evidence:
    """Evidence of texts that were measured apart: kind -> mean KL divergence, and the ends of its interval."""
    found = evaluation(kinds=tuple(kl)).quality
    assert found is not None
    kinds = tuple(
        item.model_copy(update={"mean_kl": kl[item.kind][0], "mean_kl_interval": Interval(low=low, high=high)})
        for item in found.kinds
        for low, high in [kl[item.kind][1:]]
    )
    return GOOD.model_copy(update={"quality": found.model_copy(update={"kinds": kinds})})


def said_of_kl(evidence: Evidence) -> tuple[str, str]:
    (finding,) = [item for item in decide(evidence, GateThresholds()).findings if item.gate == "KL divergence"]
    return finding.outcome, finding.reason


@pytest.mark.parametrize(
    ("figures", "outcome", "reason"),
    [
        ((0.040, 0.035, 0.045), "passed", "mean 0.0400 ± 0.0050 nats on code, the limit is 0.05"),
        ((0.048, 0.043, 0.053), "flagged", "the limit of 0.05 lies within the interval; measure more text"),
        ((0.052, 0.047, 0.057), "flagged", "the limit of 0.05 lies within the interval; measure more text"),
        ((0.060, 0.055, 0.065), "refused", "mean 0.0600 ± 0.0050 nats on code is over the limit of 0.05"),
        ((math.nan, 0.01, 0.065), "refused", "is over the limit of 0.05"),
        ((math.inf, 0.01, math.inf), "refused", "is over the limit of 0.05"),
    ],
)
def test_a_limit_within_the_interval_flags_and_the_worst_kind_decides(
    figures: tuple[float, float, float], outcome: str, reason: str
) -> None:
    found = said_of_kl(on_kinds(prose=(0.01, 0.009, 0.011), code=figures, chat=(0.02, 0.019, 0.021)))
    assert found[0] == outcome
    assert reason in found[1]
    assert " on code" in found[1]


def test_a_kind_that_is_refused_comes_before_one_that_is_flagged() -> None:
    found = said_of_kl(on_kinds(prose=(0.049, 0.04, 0.2), code=(0.06, 0.055, 0.065)))
    assert found[0] == "refused"
    assert "on code" in found[1]


def test_a_conversion_that_breaks_the_model_is_refused_by_its_own_gate() -> None:
    found = evaluation(kinds=("prose", "code"))
    assert found.conversion is not None
    broken = found.conversion.model_copy(update={"mean_kl": 1.5, "kinds": ()})
    decision = decide(GOOD.model_copy(update={"conversion": broken}), GateThresholds())
    assert [item.gate for item in decision.refusals] == ["conversion"]
    assert decision.refusals[0].reason == "mean 1.5000 nats before anything is quantized is over the limit of 0.02"
    without = decide(GOOD, GateThresholds())
    assert "conversion" not in {item.gate for item in without.findings}, "compared in one engine, there is none"


@pytest.mark.parametrize(
    ("changes", "failure", "hint"),
    [
        ({"mean_kl": 0.2}, None, "use more bits or another method, or loosen `gates`"),
        ({"mean_kl": 0.2, "checks": {NEAR: "not the source's"}}, None, "use more bits or another method, or loosen"),
        (
            {"checks": {NEAR: "not the source's"}},
            None,
            "no limit in `gates` stands for that: take another method",
        ),
        ({"checks": {RUNS: "it does not load"}}, VerifyError("x", hint="take another format"), "take another format; "),
        ({"checks": {RUNS: "it does not load"}}, None, "no gate can be loosened for that: build it again with --force"),
    ],
    ids=["limit", "limit and structure", "structure", "does not run", "does not run, nobody knows why"],
)
def test_a_refusal_has_a_remedy_that_fits(
    changes: dict[str, Any], failure: VerifyError | None, hint: str, tmp_path: Path
) -> None:
    made = SimpleNamespace(folder=tmp_path, manifest=SimpleNamespace(name="demo", variant="q8_0"))
    error = refusal(cast("Artifact", made), changed(**changes), failure)
    assert str(error.hint).startswith(hint)
    assert all(finding.reason in error.message for finding in changed(**changes).refusals)
