"""What production_decision.md says to whoever runs the model: for what, which figures, what to do when it fails."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quantize.evaluate.metric import Detail
from quantize.evaluate.metrics import headings, metrics
from quantize.recipe.gates import GateLimits
from quantize.recipe.serving import ServingContext
from quantize.report.collect import PageSubject, collect
from quantize.report.decision_text import DecisionText, decision_text
from quantize.report.production import judge
from quantize.report.render import DECISION, render
from quantize.store.store import Store
from tests.conftest import Built
from tests.pages.measured import HOSTILE, bench, evaluation, keep


@pytest.fixture
def store(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return built.copy(tmp_path_factory.mktemp("operation") / "artifacts")


def decided(store: Store, name: str = "tiny", **changes: object) -> tuple[PageSubject, DecisionText, str]:
    subject = replace(collect(store, name), **changes)  # type: ignore[arg-type]
    return subject, decision_text(subject, judge(subject)), render(subject)[DECISION]


def test_what_the_recipe_does_not_say_is_to_be_filled_in(store: Store) -> None:
    keep(store, store.find("tiny/q8_0"), found=evaluation(), load=bench())
    _, text, page = decided(store)
    rows = dict(text.serving)
    assert list(rows) == ["use case", "traffic target", "SLA", "hardware", "runtime"]
    assert rows["use case"] == "to be filled in (`serving.use_case` in the recipe)"
    assert rows["hardware"].endswith("; measured on A processor, 2 cores")
    assert rows["runtime"].endswith("; measured in llama_cpp.server, llama-cpp-python 0.3.36")
    for name, value in rows.items():
        assert f"| {name} | {value} |" in page


def test_what_the_recipe_says_is_there_and_stays_in_its_cell(store: Store) -> None:
    artifact = store.find("tiny/q8_0")
    keep(store, artifact, found=evaluation(), load=bench())
    recipe = artifact.folder / "recipe.yaml"
    said = f"serving: {{use_case: support, traffic: 2 a second, sla: {HOSTILE!r}, hardware: one card}}\n"
    recipe.write_text(recipe.read_text().rstrip("\n") + f"\n{said}")
    subject, text, page = decided(store, "tiny/q8_0")
    assert subject.serving.use_case == "support"
    assert dict(text.serving)["runtime"].startswith("to be filled in")
    assert "| hardware | one card |" in page
    assert "<script>" not in page


def test_the_figures_of_quality_and_load_are_tables(store: Store) -> None:
    keep(store, store.find("tiny/q8_0"), found=evaluation(kl=0.0123, ratio=1.0234), load=bench(latency=0.25))
    keep(store, store.find("tiny/q4_0"), found=evaluation(kl=0.2))
    subject, text, page = decided(store)
    quality = {row[0]: row[1:] for row in text.quality.rows}
    assert set(quality) == {entry.variant for entry in subject.entries}
    assert quality["q8_0"][0] == "accepted"
    assert text.quality.columns[3:] == tuple(headings(metrics(Detail.TABLE)))
    found = dict(zip(headings(metrics(Detail.TABLE)), quality["q8_0"][2:], strict=True))
    assert (found["PPL ratio"], found["mean KL"]) == ("1.0234", "0.0123")
    assert quality["q4_0"][0] == "refused"
    assert set(quality["f16"][2:]) == {"not measured"}
    assert [row[:2] for row in text.load.rows] == [("q8_0", "short x 1"), ("q8_0", "short x 4")]
    assert text.load.rows[0][2:5] == ("0.250 s",) * 3
    assert text.load.rows[0][-2:] == ("0.0%", "400 MiB")
    for table in (text.quality, text.load):
        for row in (table.columns, *table.rows):
            assert f"| {' | '.join(row)} |" in page


def test_each_trouble_has_its_steps_with_what_there_is(store: Store) -> None:
    for name, kl in (("iq4_xs", 0.04), ("q8_0", 0.01), ("f16", 0.001)):
        keep(store, store.find(f"tiny/{name}"), found=evaluation(kl=kl), load=bench())
    subject = collect(store, "tiny")
    entries = tuple(entry for entry in subject.entries if entry.variant in ("iq4_xs", "q8_0", "f16"))
    _, text, page = decided(store, entries=entries, gates=GateLimits(max_kl=0.02, max_latency_p95_seconds=4))
    steps = {title: "\n".join(lines) for title, lines in text.runbook}
    assert list(steps) == ["On timeout", "On running out of memory", "On a quality regression"]
    assert "504 `timeout`" in steps["On timeout"]
    serve = next(entry for entry in entries if entry.variant in text.headline)
    assert f"`quantize estimate {serve.called}" in steps["On running out of memory"]
    assert "503 `out_of_memory`" in steps["On running out of memory"]
    assert f"`quantize verify {serve.called}`" in steps["On a quality regression"]
    back = text.rollback[0].split("`")[1] if "`" in text.rollback[0] else "the source"
    assert back in steps["On a quality regression"]
    order = [page.index(title) for title in ("## Quality", "## Load", "## Decision", "## Conditions", "### On timeout",
             "### On running out of memory", "### On a quality regression", "## Rollback")]  # fmt: skip
    assert order == sorted(order)


def test_the_next_smaller_artifact_is_named_where_there_is_one(store: Store) -> None:
    for name, kl in (("q4_0", 0.04), ("q4_k_m", 0.001)):
        keep(store, store.find(f"tiny/{name}"), found=evaluation(kl=kl), load=bench())
    subject = collect(store, "tiny")
    sizes = {"q4_0": 1000, "q4_k_m": 1040}  # so near in size that the better one is served
    entries = []
    for entry in subject.entries:
        if entry.variant in sizes:
            manifest = entry.artifact.manifest.model_copy(update={"size_bytes": sizes[entry.variant]})
            entries.append(replace(entry, artifact=replace(entry.artifact, manifest=manifest)))
    _, text, _ = decided(store, entries=tuple(entries))
    assert text.headline == "Serve q4_k_m."
    steps = dict(text.runbook)["On running out of memory"]
    assert steps[-1].startswith("Take `tiny/q4_0@")
    (only,) = [entry for entry in entries if entry.variant == "q4_0"]
    _, text, _ = decided(store, entries=(only,))
    assert dict(text.runbook)["On running out of memory"][-1].startswith("No smaller artifact keeps every limit")


def test_where_nothing_is_served_there_is_no_trouble(store: Store) -> None:
    _, text, page = decided(store)
    assert text.runbook == ()
    assert "Nothing is served, so nothing can." in page
    assert "Not measured: `quantize bench` does that." in page
    assert ServingContext().use_case is None
