"""README and the documents show the figures of docs/results.json, and those are what a store says."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import demo_block, formats_table, read, report_block
from quantize.errors import UsageError
from quantize.store.store import Store
from tests.conftest import Built
from tests.pages.measured import evaluation, keep, prompt

ROOT = Path(__file__).parent.parent
SCRIPT = runpy.run_path(str(ROOT / "docs" / "make_results.py"))
RESULTS: dict[str, Any] = json.loads((ROOT / "docs" / "results.json").read_text(encoding="utf-8"))
BLOCKS: dict[tuple[str, str], str] = SCRIPT["blocks"](RESULTS)
between: Callable[[str, str, str], str] = SCRIPT["between"]


@pytest.mark.parametrize(("file", "name"), list(BLOCKS), ids=lambda part: str(part))
def test_the_documents_show_the_results(file: str, name: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert between(text, name, BLOCKS[file, name]) == text, "run: python docs/make_results.py"


def test_both_recipes_have_the_same_variants() -> None:
    demo, dithered = ({row["variant"] for row in RESULTS[part]["artifacts"]} for part in ("demo", "dithered"))
    assert len(demo) == 7
    assert demo == dithered


def test_another_figure_is_another_document() -> None:
    rows = RESULTS["demo"]["artifacts"]
    for key, value in (("mean_kl", 0.5), ("size_bytes", 1), ("golden_passed", 0), ("passes_default_gates", True)):
        changed = RESULTS["demo"] | {"artifacts": [row | {key: value} for row in rows]}
        assert demo_block(changed) != demo_block(RESULTS["demo"]), key


def test_a_part_without_markers_is_refused() -> None:
    with pytest.raises(SystemExit, match="stands there 0 times"):
        between("# A document\n", "demo", "text")
    twice = "<!-- demo: written by docs/make_results.py -->\n<!-- end of demo -->\n" * 2
    with pytest.raises(SystemExit, match="stands there 2 times"):
        between(twice, "demo", "text")


@pytest.fixture
def store(built: Built, tmp_path: Path) -> Store:
    """A store of three artifacts, measured: the smallest diverges most, the largest is within the default limits."""
    store = built.copy(tmp_path / "own")
    asked = [prompt(n, source=n < 7, artifact=n < 10, kind="json" if n == 0 else "contains") for n in range(12)]
    for artifact in store.artifacts():
        kl = {"q4_0": 0.3, "q8_0": 0.004}.get(artifact.manifest.variant, 0.06)
        keep(store, artifact, found=evaluation(kl=kl, prompts=asked))
    return store


def test_figures_are_those_of_the_store(store: Store) -> None:
    data = read(store, "tiny")
    manifests = {item.manifest.variant: item.manifest for item in store.artifacts()}
    assert [row["size_bytes"] for row in data["artifacts"]] == sorted(item.size_bytes for item in manifests.values())
    (row,) = [row for row in data["artifacts"] if row["variant"] == "q8_0"]
    assert row == {
        "variant": "q8_0", "format": "gguf", "size_bytes": manifests["q8_0"].size_bytes,
        "bits_per_weight": round(manifests["q8_0"].bits_per_weight, 4), "perplexity_ratio": 1.004, "mean_kl": 0.004,
        "golden_passed": 10, "verdict": "accepted", "passes_default_gates": True,
    }  # fmt: skip
    assert data["golden"] == {"source_passed": 7, "prompts": 12}
    assert data["decision"].startswith("Serve q8_0.")
    assert data["tools"]["llama.cpp"] == "0.3.36"
    assert json.loads(json.dumps(data)) == data


def test_the_tables_read_as_they_should(store: Store) -> None:
    data = read(store, "tiny")
    text = demo_block(data)
    assert "the source passes 7 of 12 golden prompts" in " ".join(text.split())
    assert "accept `q8_0`; the demo recipe" in " ".join(text.split())
    assert sum("| 10 of 12 |" in line for line in text.splitlines()) == 6
    ranked = [line.split("`")[1] for line in formats_table(data).splitlines()[2:]]
    assert (ranked[0], ranked[-1]) == ("q8_0", "q4_0")
    assert [line.count("|") for line in formats_table(data, short=True).splitlines()] == [5] * 8
    assert "| `q4_0` | refused |" in report_block(data)


def test_intervals_and_the_worst_kind_of_text_are_shown(built: Built, tmp_path: Path) -> None:
    store = built.copy(tmp_path / "own")
    asked = [prompt(n, kind="json" if n == 0 else "contains") for n in range(12)]
    for artifact in store.artifacts():
        keep(store, artifact, found=evaluation(kl=0.04, prompts=asked, kinds=("prose", "code")))
    data = json.loads(json.dumps(read(store, "tiny")))
    (row,) = [row for row in data["artifacts"] if row["variant"] == "q8_0"]
    assert (row["mean_kl"], row["mean_kl_interval"]) == (0.04, [0.036, 0.044])
    assert (row["worst_kind"], row["worst_kl"], row["worst_kl_interval"]) == ("code", 0.044, [0.0396, 0.0484])
    for text in (demo_block(data), formats_table(data), report_block(data)):
        lines = [line for line in text.splitlines() if line.startswith("|")]
        (shown,) = [line for line in lines if "`q8_0`" in line]
        assert "| 1.0040 ± 0.0010 | 0.0400 ± 0.0040 | 0.0440 ± 0.0044 (code) |" in shown
        assert "worst kind of text" in lines[0]
        assert len({line.count("|") for line in lines}) == 1


def test_what_was_not_measured_alike_is_refused(store: Store) -> None:
    with pytest.raises(UsageError):
        read(store, "other")
    path = store.find("tiny/q8_0").folder / "measurements.json"
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace("cd" * 32, "00" * 32), encoding="utf-8")
    with pytest.raises(SystemExit, match="not all were measured on the same quality"):
        read(store, "tiny")
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit, match="was not measured"):
        read(store, "tiny")
