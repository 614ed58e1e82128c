"""A new metric is a field of the record and a line in METRICS: every table, card and page shows it by that alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantize.evaluate import metrics
from quantize.evaluate.decision import GateThresholds, Verdict
from quantize.evaluate.gates import decide, gates
from quantize.evaluate.metric import Better, Detail, Limit, Metric
from quantize.evaluate.page import render_page
from quantize.evaluate.record import Evidence, Figures, Quality, read_record
from quantize.provenance.card import render_card
from quantize.provenance.sbom import bill_of_materials
from quantize.report.collect import collect
from quantize.report.render import HTML, MARKDOWN, render
from quantize.store.artifact import update_measurements
from quantize.store.store import Store
from tests.conftest import Built, Run
from tests.pages.measured import evaluation, keep

FIELD = "median_agreement"


def _median(found: Evidence) -> float | None:
    """As the field would be read: the record keeps what it does not know, so that no model has to be changed here."""
    return None if found.quality is None else getattr(found.quality, FIELD, None)


NEW = Metric(
    FIELD, "median agreement", "median", read=_median, itself=0.5, unit="bits", digits=3, better=Better.HIGHER,
    detail=Detail.LIST,
)  # fmt: skip
LIMITED = replace(NEW, limit=Limit("agreement", "min_agreement", "median {}"))
SHOWN, OTHER = "0.123", "0.456"


@pytest.fixture
def store(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Two artifacts whose records have the figure."""
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, NEW))
    store = built.copy(tmp_path / "own")
    for variant, value in (("q8_0", 0.12345), ("q4_0", 0.45612)):
        artifact = store.find(f"tiny/{variant}")
        keep(store, artifact, found=evaluation(kl=value))
        record = artifact.measurements()["evaluation"]
        record["quality"][FIELD] = value
        update_measurements(store.root, artifact, {"evaluation": record})
    return store


def words_of(text: str, start: str) -> list[str]:
    """The words of the line that begins so."""
    return next(line for line in text.splitlines() if line.strip().startswith(start)).split()


def test_commands_show_it(store: Store, run: Run) -> None:
    listed = run("list", "artifacts", "--store", store.root).stdout.splitlines()
    assert " MEDIAN " in listed[1]
    assert SHOWN in next(line for line in listed if " q8_0 " in line)
    found = json.loads(run("list", "artifacts", "--store", store.root, "--json").stdout)
    assert {row["variant"]: row["evaluation"][FIELD] for row in found}["q8_0"] == 0.12345
    shown = run("show", "tiny/q8_0", "--store", store.root).stdout
    assert words_of(shown, "median agreement") == ["median", "agreement", SHOWN, "bits", "0.5"]
    difference = run("diff", "tiny/q8_0", "tiny/q4_0", "--store", store.root).stdout
    assert words_of(difference, "median agreement") == ["median", "agreement,", "bits", SHOWN, OTHER]


def test_pages_card_and_papers_show_it(store: Store) -> None:
    artifact = store.find("tiny/q8_0")
    record = read_record(artifact.measurements())
    assert record is not None
    row = f"| median agreement | {SHOWN} bits | 0.5 |"
    assert row in render_page(record, "tiny")
    assert row in render_card(artifact.manifest, artifact.measurements())
    card = bill_of_materials(artifact)["metadata"]["component"]["modelCard"]
    found: list[dict[str, Any]] = card["quantitativeAnalysis"]["performanceMetrics"]
    assert {"type": "median agreement (bits), against the base model", "value": "0.12345"} in found
    texts = render(collect(store, "tiny"))
    head, source, *rows = [line for line in texts[MARKDOWN].splitlines() if line.startswith("| ")][:9]
    place = head.split(" | ").index("median")
    assert source.split(" | ")[place] == "0.5"
    assert SHOWN in {(line.split(" | ") + [""] * 9)[place] for line in rows}
    assert f"<td>{SHOWN}</td>" in texts[HTML]


def test_its_gate_holds_and_is_in_the_table_of_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, LIMITED))
    (gate,) = [item for item in gates() if item.name == "agreement"]
    limits = GateThresholds.model_validate({"min_agreement": 0.2})
    assert gate.bound(limits) == "at least 0.2 bits"
    quality = evaluation().quality
    verdicts = {}
    for value in (0.1, 0.2, float("nan")):
        found = Evidence(quality=quality.model_copy(update={FIELD: value}), figures=Figures())
        (finding,) = [item for item in decide(found, limits).findings if item.gate == "agreement"]
        verdicts[value] = finding
    assert [item.outcome for item in verdicts.values()] == ["refused", "passed", "refused"]
    assert verdicts[0.1].reason == "median 0.100 bits is under the limit of 0.2"
    missing = decide(Evidence(quality=quality), limits)
    assert "agreement" in {item.gate for item in missing.missing}
    assert missing.verdict is Verdict.INSUFFICIENT


@pytest.mark.parametrize("item", metrics.METRICS, ids=lambda item: item.key)
def test_every_metric_reads_what_was_measured(item: Metric) -> None:
    found = evaluation(kinds=("prose", "code"))
    load = Figures(latency_p95_seconds=0.5, error_rate=0.0, peak_memory_bytes=1 << 30)
    measured = Evidence(quality=found.quality, golden=found.golden, conversion=found.conversion, figures=load)
    reading = item.reading(measured)
    assert reading is not None
    assert reading.text
    assert item.reading(Evidence()) is None


def test_every_number_of_quality_is_a_metric_or_says_on_what_it_was_measured() -> None:
    not_shown = {"source_perplexity", "max_kl"}  # the first beside that of the artifact, the second by chance alone
    not_shown |= {"kinds", "per_window"}  # the same figures by kind of text; what two artifacts are compared by
    not_shown |= {f"{item.key}_interval" for item in metrics.METRICS if item.interval is not None}
    about = {"predictions", "windows", "window_tokens", "kl_is_exact"}
    about |= {name for name, field in Quality.model_fields.items() if field.annotation is str}
    assert set(Quality.model_fields) - about - not_shown <= {item.key for item in metrics.METRICS}
