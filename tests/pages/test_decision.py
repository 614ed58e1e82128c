"""The production decision: which artifact is served, on what evidence, and how to go back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantize.evaluate.decision import GateThresholds
from quantize.recipe.gates import GateLimits
from quantize.report.collect import PageSubject, collect
from quantize.report.decision_text import decision_text
from quantize.report.production import Choice, judge
from quantize.store.store import Store
from tests.conftest import Built
from tests.pages.measured import bench, evaluation, keep, prompt

VARIANTS = ("iq4_xs", "q4_0", "q4_k_m", "q5_k_s", "q8_0", "f16")  # by size


@pytest.fixture
def store(built: Built, tmp_path: Path) -> Store:
    """A store of the tiny model that a test may measure."""
    return built.copy(tmp_path / "own")


def measure_all(store: Store, **kl: float) -> None:
    """Everything measured and well, with the KL divergences given."""
    for variant in VARIANTS:
        keep(store, store.find(f"tiny/{variant}"), found=evaluation(kl=kl.get(variant, 0.004)), load=bench())


def judged(store: Store, name: str | None = None) -> tuple[PageSubject, Choice, dict[str, str]]:
    """Subject, choice and the word for each variant."""
    subject = collect(store, name)
    choice = judge(subject)
    return subject, choice, {item.entry.variant: item.word for item in choice.verdicts}


def test_nothing_measured_is_insufficient_evidence(store: Store) -> None:
    subject, choice, words = judged(store)
    assert [entry.variant for entry in subject.entries][-2:] == ["q8_0", "f16"]  # by size
    assert set(words.values()) == {"insufficient evidence"}
    missing = [finding.gate for finding in choice.verdicts[0].decision.missing]
    expected = ["KL divergence", "perplexity", "golden prompts", "JSON answers"]
    assert missing == expected
    text = decision_text(subject, choice)
    assert (text.word, text.headline, choice.serve) == ("insufficient evidence", "Insufficient evidence.", None)
    assert all(gate in text.why for gate in expected)
    smallest = subject.entries[0].variant
    assert text.why.endswith(f"To measure it: `quantize eval tiny/{smallest}`.")
    assert text.rollback == ("Nothing new is served: what serves now goes on.",)


def test_the_smallest_accepted_is_served_and_the_next_is_the_way_back(store: Store) -> None:
    measure_all(store, iq4_xs=0.3, q4_0=0.2, q4_k_m=0.06)
    subject, choice, words = judged(store)
    assert [words[name] for name in VARIANTS] == ["refused"] * 3 + ["accepted"] * 3
    assert choice.serve is not None
    assert choice.fallback is not None
    assert choice.serve.entry.variant == "q5_k_s"
    text = decision_text(subject, choice)
    assert (text.word, text.headline) == ("accepted", "Serve q5_k_s.")
    assert choice.fallback.entry.artifact.ref in text.rollback[0]
    assert any(choice.serve.entry.artifact.ref in line for line in text.conditions)
    assert any("At most 4 requests at a time" in line for line in text.conditions)
    assert any("context 512 tokens" in line for line in text.conditions)


def test_quality_is_enough_where_no_limit_asks_for_a_load(store: Store) -> None:
    keep(store, store.find("tiny/q8_0"), found=evaluation())
    subject, choice, words = judged(store)
    assert words["q8_0"] == "accepted"
    text = decision_text(subject, choice)
    assert (text.word, text.headline) == ("accepted", "Serve q8_0.")
    assert "Latency, error rate and memory were not measured (`quantize bench tiny/q8_0`)" in text.why
    assert any("Nothing is known of latency, error rate and memory" in line for line in text.conditions)
    assert not any("No limit on" in line for line in text.conditions)  # there is no figure to decide about


@pytest.mark.parametrize(
    ("gates", "gate"),
    [
        ({"max_latency_p95_seconds": 0.4}, "latency"),
        ({"max_error_rate": 0.05}, "error rate"),
        ({"max_memory_bytes": 100 << 20}, "memory"),
    ],
)
def test_a_limit_that_the_recipe_sets_asks_for_its_figure(store: Store, gates: dict[str, float], gate: str) -> None:
    keep(store, store.find("tiny/q8_0"), found=evaluation())
    subject = collect(store, "tiny/q8_0")
    choice = judge(PageSubject(subject.name, subject.entries, GateLimits.model_validate(gates), ""))
    assert choice.serve is None
    assert [finding.gate for finding in choice.verdicts[0].decision.missing] == [gate]
    text = decision_text(subject, choice)
    assert text.headline == "Insufficient evidence."
    assert f"no evidence of: {gate}. To measure it: `quantize bench tiny/q8_0`." in text.why


def test_an_evaluation_without_prompts_asks_for_some(store: Store) -> None:
    keep(store, store.find("tiny/q8_0"), found=replace(evaluation(), golden=None))
    subject, choice, words = judged(store, "tiny/q8_0")
    assert words == {"q8_0": "insufficient evidence"}
    why = decision_text(subject, choice).why
    assert "To measure it: golden prompts in the recipe (`evaluation.golden`)" in why
    assert "quantize eval" not in why  # which would find the same again


def test_evidence_of_both_kinds_is_asked_for(store: Store) -> None:
    subject = collect(store, "tiny/q8_0")
    choice = judge(PageSubject(subject.name, subject.entries, GateLimits(max_error_rate=0.05), ""))
    why = decision_text(subject, choice).why
    assert why.endswith("To measure it: `quantize eval tiny/q8_0` and `quantize bench tiny/q8_0`.")


def sized(subject: PageSubject, sizes: dict[str, int]) -> PageSubject:
    """The subject with only these artifacts, of these sizes in bytes."""
    entries = []
    for entry in subject.entries:
        if entry.variant in sizes:
            manifest = entry.artifact.manifest.model_copy(update={"size_bytes": sizes[entry.variant]})
            entries.append(replace(entry, artifact=replace(entry.artifact, manifest=manifest)))
    return replace(subject, entries=tuple(entries))


@pytest.mark.parametrize(
    ("sizes", "kl", "serve", "back"),
    [
        # within 5 % of the smallest, the one that diverges least; the way back is larger and no worse
        ((100, 104, 105, 140), (0.04, 0.02, 0.03, 0.004), "q4_0", "q5_k_s"),
        ((100, 104, 106, 140), (0.04, 0.03, 0.02, 0.004), "q4_0", "q4_k_m"),  # 6 % is another size
        ((100, 104, 105, 140), (0.04, 0.04, 0.04, 0.04), "iq4_xs", "q4_0"),  # equals: the smallest
        ((100, 110, 120, 140), (0.01, 0.02, 0.03, 0.04), "iq4_xs", None),  # nothing that is larger is better
        ((100, 104, 105, 140), (0.9, 0.04, 0.9, 0.02), "q4_0", "q5_k_s"),  # what is refused counts for nothing
    ],
)
def test_which_one_is_served(
    store: Store, sizes: tuple[int, ...], kl: tuple[float, ...], serve: str, back: str | None
) -> None:
    names = VARIANTS[:4]
    for name, value in zip(names, kl, strict=True):
        keep(store, store.find(f"tiny/{name}"), found=evaluation(kl=value))
    subject = sized(collect(store, "tiny"), dict(zip(names, sizes, strict=True)))
    choice = judge(subject)
    assert choice.serve is not None
    assert choice.serve.entry.variant == serve
    assert (choice.fallback.entry.variant if choice.fallback else None) == back
    text = decision_text(subject, choice)
    assert (text.rollback[0].startswith("Go back to the source itself")) == (back is None)


def test_the_reason_has_the_figures(store: Store) -> None:
    for name, value in (("iq4_xs", 0.04), ("q4_0", 0.02)):
        keep(store, store.find(f"tiny/{name}"), found=evaluation(kl=value))
    subject = sized(collect(store, "tiny"), {"iq4_xs": 1000, "q4_0": 1006})
    why = decision_text(subject, judge(subject)).why
    assert why.startswith(
        "It is only 0.6% larger than iq4_xs, the smallest of the 2 artifacts that keep every limit, and its mean KL "
        "divergence is 0.0200 nats, not 0.0400."
    )


def test_load_alone_is_not_enough(store: Store) -> None:
    keep(store, store.find("tiny/q8_0"), load=bench())
    _, choice, _ = judged(store, "tiny/q8_0")
    assert [item.gate for item in choice.verdicts[0].decision.missing] == [
        "KL divergence",
        "perplexity",
        "golden prompts",
        "JSON answers",
    ]


def test_all_refused(store: Store) -> None:
    measure_all(store, **dict.fromkeys(VARIANTS, 0.5))
    subject, choice, _ = judged(store)
    text = decision_text(subject, choice)
    assert (text.word, text.headline, text.conditions) == ("refused", "Serve none of these.", ())


@pytest.mark.parametrize(
    ("gates", "load", "gate", "ending"),
    [
        ({"max_latency_p95_seconds": 0.4}, {"latency": 0.5}, "latency", "over the limit of 0.4 (short x 1)"),
        ({"max_memory_bytes": 100 << 20}, {"peak": 101 << 20}, "memory", "over the limit of 104,857,600 (RAM)"),
        ({"max_error_rate": 0.05}, {"errors": 2}, "error rate", "over the limit of 0.05"),
        ({}, {"errors": 1}, "error rate", "over the limit of 0.01"),  # the default; this is one in twenty
    ],
)
def test_serving_limits_refuse(
    store: Store, gates: dict[str, float], load: dict[str, float], gate: str, ending: str
) -> None:
    keep(store, store.find("tiny/q8_0"), found=evaluation(), load=bench(**load))  # type: ignore[arg-type]
    subject = collect(store, "tiny/q8_0")
    choice = judge(PageSubject(subject.name, subject.entries, GateLimits.model_validate(gates), ""))
    (refusal,) = choice.verdicts[0].decision.refusals
    assert refusal.gate == gate
    assert refusal.reason.endswith(ending)


def test_serving_limits_that_are_kept_are_said(store: Store) -> None:
    keep(store, store.find("tiny/q8_0"), found=evaluation(), load=bench(latency=0.5, peak=90 << 20))
    subject = collect(store, "tiny/q8_0")
    gates = {"max_latency_p95_seconds": 0.6, "max_memory_bytes": 100 << 20, "max_error_rate": 0.001}
    choice = judge(PageSubject(subject.name, subject.entries, GateLimits.model_validate(gates), ""))
    assert choice.verdicts[0].word == "accepted"
    text = decision_text(subject, choice)
    assert not any("No limit" in line for line in text.conditions)
    assert ("latency, 95th percentile", "at most 0.6 s") in text.limits
    assert "0.6 s" in text.rollback[1]


def test_the_limits_of_the_evaluation_hold(store: Store) -> None:
    loose = GateThresholds(max_kl=0.5)
    keep(store, store.find("tiny/q8_0"), found=evaluation(kl=0.3), load=bench(), limits=loose)
    _, choice, _ = judged(store, "tiny/q8_0")
    assert (choice.verdicts[0].word, choice.verdicts[0].limits.max_kl) == ("accepted", 0.5)


def test_flags_are_for_a_person(store: Store) -> None:
    keep(store, store.find("tiny/q8_0"), found=evaluation(ratio=0.9), load=bench())
    subject, choice, words = judged(store, "tiny/q8_0")
    assert words == {"q8_0": "accepted with flags"}
    assert any("A person looks at: perplexity" in line for line in decision_text(subject, choice).conditions)


def test_a_lost_json_answer_refuses(store: Store) -> None:
    asked = [*(prompt(n) for n in range(9)), prompt(9, kind="json", artifact=False)]
    keep(store, store.find("tiny/q8_0"), found=evaluation(prompts=asked), load=bench())
    _, choice, _ = judged(store, "tiny/q8_0")
    assert [item.gate for item in choice.verdicts[0].decision.refusals] == ["JSON answers"]


def test_a_risk_that_was_accepted_is_a_flag_with_its_reason(store: Store) -> None:
    from quantize.store.artifact import commit
    from quantize.store.manifest import AcceptedRisk

    artifact = store.find("tiny/q8_0")
    keep(store, artifact, found=evaluation(kl=0.2), load=bench())
    risk = AcceptedRisk(reason="a demo, no users", gates=("KL divergence",))
    commit(store.root, artifact.folder, artifact.manifest.model_copy(update={"accepted_risk": risk}).sealed())
    subject, choice, words = judged(store, "tiny/q8_0")
    assert words == {"q8_0": "accepted with flags"}
    assert any("a demo, no users" in line for line in decision_text(subject, choice).conditions)


def test_a_refused_build_is_on_the_page(store: Store) -> None:
    from quantize.store.artifact import REFUSED, set_aside

    artifact = store.find("tiny/q4_0")
    keep(store, artifact, found=evaluation(kl=0.2), load=bench())
    set_aside(store.root, artifact.folder, artifact.manifest, REFUSED)
    subject, _, words = judged(store)
    assert words["q4_0"] == "refused"
    assert [entry.refused for entry in subject.entries if entry.variant == "q4_0"] == [True]


def test_measurements_that_can_not_be_read_are_no_evidence(store: Store) -> None:
    artifact = store.find("tiny/q8_0")
    (artifact.folder / "measurements.json").write_text('{"bench": {"cells": 3}, "evaluation": [], "layers": {"x": 1}}')
    _, choice, words = judged(store, "tiny/q8_0")
    assert words == {"q8_0": "insufficient evidence"}
    assert choice.verdicts[0].entry.layers == ()
