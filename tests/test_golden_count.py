"""Golden prompts are counted in the same words wherever they are shown: "10 of 12", and what the source passes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from quantize.evaluate.page import render_page
from quantize.evaluate.record import GoldenCount, read_record, source_lines
from quantize.provenance.card import render_card
from quantize.report.collect import collect
from quantize.report.render import HTML, MARKDOWN, render
from quantize.store.store import Store
from tests.conftest import Built, Run
from tests.pages.measured import evaluation, keep, prompt


@pytest.fixture
def store(built: Built, tmp_path: Path) -> Store:
    """One artifact that passes more prompts than its source does, of twelve."""
    store = built.copy(tmp_path / "own")
    asked = [prompt(n, source=n < 7, artifact=n < 10, kind="json" if n == 0 else "contains") for n in range(12)]
    keep(store, store.find("tiny/q8_0"), found=evaluation(prompts=asked))
    return store


def test_the_list_counts_what_is_passed_of_all(store: Store, run: Run) -> None:
    lines = run("list", "artifacts", "--store", store.root).stdout.splitlines()
    (row,) = [line for line in lines if " q8_0 " in line]
    assert "10 of 12" in row
    assert lines[-1] == "the source passes 7 of 12 golden prompts"
    assert "10 of 7" not in "".join(lines)


def test_the_markdown_list_keeps_the_line_out_of_the_table(store: Store, run: Run) -> None:
    lines = run("list", "artifacts", "--store", store.root, "--markdown").stdout.splitlines()
    assert lines[-2:] == ["", "the source passes 7 of 12 golden prompts"]
    assert any("| 10 of 12 |" in line for line in lines)


def test_programs_get_numbers(store: Store, run: Run) -> None:
    listed = json.loads(run("list", "artifacts", "--store", store.root, "--json").stdout)
    found = {item["variant"]: item["evaluation"]["golden"] for item in listed}
    assert found["q8_0"] == {"passed": 10, "source_passed": 7, "prompts": 12}
    assert found["f16"] is None


def test_show_card_and_pages_say_the_same(store: Store, run: Run) -> None:
    artifact = store.find("tiny/q8_0")
    measurements = artifact.measurements()
    shown = run("show", "tiny/q8_0", "--store", store.root).stdout
    assert re.search(r"golden prompts passed +10 of 12 +7 of 12", shown)
    assert "passes 10 of 12, the source passes 7 of 12; at least 95% of the source's are needed" in shown
    card = render_card(artifact.manifest, measurements)
    assert "| golden prompts passed | 10 of 12 | 7 of 12 |\n| golden prompts lost | 0 | 0 |" in card
    record = read_record(measurements)
    assert record is not None
    page = render_page(record, "tiny/q8_0")
    assert "The artifact passes 10 of 12, the source passes 7 of 12; 0 lost." in page
    texts = render(collect(store, "tiny"))
    assert "The source passes 7 of 12 golden prompts." in texts[HTML]
    rows = [line.split(" | ") for line in texts[MARKDOWN].splitlines() if line.startswith(("| source |", "| q8_0 |"))]
    assert [row[9].strip(" |") for row in rows[:2]] == ["7 of 12", "10 of 12"]


def test_one_line_for_each_source_and_set_of_prompts() -> None:
    one, other = GoldenCount(16, 14, 23), GoldenCount(9, 8, 12)
    assert source_lines([]) == []
    assert source_lines([("a", None)]) == []
    assert source_lines([("a", one), ("a", GoldenCount(3, 14, 23))]) == ["the source passes 14 of 23 golden prompts"]
    assert source_lines([("a", one), ("a", other)]) == [
        "the source passes 14 of 23 golden prompts",
        "the source passes 8 of 12 golden prompts",
    ]
    assert source_lines([("a", one), ("b", other)]) == [
        "the source of a passes 14 of 23 golden prompts",
        "the source of b passes 8 of 12 golden prompts",
    ]
