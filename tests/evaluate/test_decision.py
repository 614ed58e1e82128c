"""The decision rule on figures that were measured, and at its edges."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.errors import GateError
from quantize.evaluate.gates import Decision, Figures, GateThresholds, decide, sign_test

GOOD = Figures(
    mean_kl=0.004,
    perplexity_ratio=1.004,
    golden_source_passed=20,
    golden_artifact_passed=20,
    golden_prompts=41,
    json_source_passed=6,
    json_lost=0,
    size_bytes=145,
    source_bytes=270,
    checks={"chat template kept": ""},
)


def changed(**changes: object) -> Decision:
    return decide(dataclasses.replace(GOOD, **changes), GateThresholds())  # type: ignore[arg-type]


def test_what_is_good_is_accepted() -> None:
    decision = decide(GOOD, GateThresholds())
    assert decision.verdict == "accepted"
    assert {item.outcome for item in decision.findings} == {"passed"}
    decision.raise_if_refused("Q8_0")


@pytest.mark.parametrize(("name", "ratio", "kl"), [("Q4_K_M", 1.084, 0.056), ("Q5_K_M", 1.099, 0.071)])
def test_the_demo_model_s_small_files_are_refused_with_their_numbers(name: str, ratio: float, kl: float) -> None:
    decision = changed(perplexity_ratio=ratio, mean_kl=kl)
    with pytest.raises(GateError) as caught:
        decision.raise_if_refused(name)
    message = str(caught.value)
    assert f"mean {kl:.4f} nats is over the limit of 0.05" in message
    assert f"{ratio:.4f} times the source's is over the limit of 1.05" in message
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(("ratio", "kl"), [(1.004, 0.004), (1.019, 0.02)])
def test_q8_and_int8_pass(ratio: float, kl: float) -> None:
    assert changed(perplexity_ratio=ratio, mean_kl=kl).accepted


@pytest.mark.parametrize(
    ("gate", "changes", "number"),
    [
        ("golden prompts", {"golden_artifact_passed": 15}, "passes 15 of 41, the source passes 20 of 41: 75%"),
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
    ("gate", "changes"),
    [
        ("KL divergence", {"mean_kl": None}),
        ("perplexity", {"perplexity_ratio": None}),
        ("golden prompts", {"golden_source_passed": None}),
        ("golden prompts", {"golden_source_passed": 4, "golden_artifact_passed": 0}),
        ("JSON answers", {"json_source_passed": 0}),
        ("JSON answers", {"json_source_passed": None}),
        ("size", {"source_bytes": None}),
    ],
)
def test_what_was_not_measured_is_said(gate: str, changes: dict[str, object]) -> None:
    decision = changed(**changes)
    assert [item.gate for item in decision.missing] == [gate]
    assert decision.accepted
    assert decision.verdict == "insufficient evidence"


def test_a_gain_that_is_too_good_is_flagged() -> None:
    decision = changed(perplexity_ratio=0.94)
    assert decision.verdict == "accepted with flags"
    assert "not plausible" in decision.flags[0].reason
    assert changed(perplexity_ratio=0.96).verdict == "accepted"


def test_a_refusal_outweighs_what_is_missing() -> None:
    assert changed(mean_kl=1.0, perplexity_ratio=None).verdict == "refused"


def test_serving_figures_count_where_a_limit_is_given() -> None:
    limits = GateThresholds(max_latency_p95_seconds=2.0, max_error_rate=0.01, max_memory_bytes=8 * 2**30)
    assert len(decide(GOOD, limits).missing) == 3
    slow = dataclasses.replace(GOOD, latency_p95_seconds=2.5, error_rate=0.1, peak_memory_bytes=2**30)
    assert [item.gate for item in decide(slow, limits).refusals] == ["latency", "error rate"]


def test_a_recipe_s_gates_take_the_place_of_the_defaults() -> None:
    limits = GateThresholds().with_gates({"max_kl": 0.2, "max_perplexity_ratio": None, "unknown": 1})
    assert (limits.max_kl, limits.max_perplexity_ratio) == (0.2, 1.05)


@pytest.mark.parametrize(
    ("lost", "gained", "outcome"),
    [(1, 0, "passed"), (4, 0, "flagged"), (5, 0, "refused"), (6, 2, "flagged"), (8, 1, "refused")],
)
def test_a_few_lost_prompts_may_be_chance(lost: int, gained: int, outcome: str) -> None:
    decision = changed(golden_artifact_passed=20 - lost + gained, golden_lost=lost)
    (finding,) = [item for item in decision.findings if item.gate == "golden prompts"]
    assert finding.outcome == outcome


def test_a_recipe_s_own_rate_is_taken_at_its_word() -> None:
    limits = GateThresholds().with_gates({"min_golden_pass_rate": 0.95})
    measured = dataclasses.replace(GOOD, golden_artifact_passed=18, golden_lost=2)
    assert [item.gate for item in decide(measured, limits).refusals] == ["golden prompts"]
    assert decide(measured, GateThresholds()).accepted


def test_the_sign_test_by_hand() -> None:
    assert sign_test(5, 0) == 1 / 32
    assert sign_test(0, 0) == 1
    assert sign_test(1, 1) == 0.75


figures = st.builds(
    Figures,
    mean_kl=st.none() | st.floats(),
    perplexity_ratio=st.none() | st.floats(),
    golden_source_passed=st.none() | st.integers(0, 50),
    golden_artifact_passed=st.none() | st.integers(0, 50),
    json_source_passed=st.none() | st.integers(0, 9),
    json_lost=st.none() | st.integers(0, 9),
    size_bytes=st.none() | st.integers(0, 10**12),
    source_bytes=st.none() | st.integers(0, 10**12),
    checks=st.dictionaries(st.text(min_size=1), st.text(), max_size=3),
)


@given(figures)
def test_every_figure_gets_a_sentence(measured: Figures) -> None:
    decision = decide(measured, GateThresholds())
    assert len(decision.findings) == 5 + len(measured.checks)
    assert all(item.reason for item in decision.findings)
    assert decision.accepted == (decision.verdict != "refused")
