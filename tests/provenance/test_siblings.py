"""A card among the other variants of its recipe: the same wherever it goes, until somebody asks for a new one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from quantize.evaluate.comparison import NAME, read_comparison
from quantize.events import ListReporter
from quantize.provenance.documents import write_documents
from quantize.provenance.signature import check_signature
from quantize.store.artifact import update_measurements
from quantize.store.manifest import CARD_NAME, CHART_NAME
from quantize.store.store import Store
from quantize.store.verify import check_files
from tests.conftest import Built, Run
from tests.pages.measured import HOSTILE, evaluation, keep
from tests.provenance.conftest import Keys

KINDS = ("prose", "code")


@pytest.fixture
def store(built: Built, tmp_path: Path) -> Store:
    """A store in which two variants were measured."""
    store = built.copy(tmp_path / "own")
    measure(store, q4_0=0.03, q8_0=0.004)
    return store


def measure(store: Store, **kl: float) -> None:
    for variant, value in kl.items():
        keep(store, store.find(f"tiny/{variant}"), found=evaluation(kl=value, kinds=KINDS))


def publish(run: Run, store: Store, variant: str, to: Path, *options: object) -> dict[str, Any]:
    words = ("publish", f"tiny/{variant}", "--to", to, "--no-lock", "--store", store.root, "--json", *options)
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)
    return dict(found)


def card(store: Store, variant: str = "q8_0") -> str:
    return (store.find(f"tiny/{variant}").folder / CARD_NAME).read_text(encoding="utf-8")


def test_the_card_compares_the_variants(store: Store, run: Run, tmp_path: Path) -> None:
    publish(run, store, "q8_0", tmp_path / "share")
    text = ModelCard(card(store)).text
    for part in (
        "## Compared", "Take q4_0, because it is the smallest of the 2 artifacts that keep every limit.",
        "The next better one is q8_0: ", "no larger is better beyond the noise: q4_0, q8_0.",
        "| variant | size | mean KL | prose | code | front | gates |",
        "| 0.0300 ± 0.0030 | 0.0300 ± 0.0030 | **0.0330 ± 0.0033** | on it |",
        "| iq4_xs |", "| not measured | not measured | not measured | – | not evaluated |",
    ):  # fmt: skip
        assert part in text
    assert "| **q8_0** (this one) | " in text
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    images = [item for token in tokens for item in token.children or () if item.type == "image"]
    assert [item.attrs["src"] for item in images] == [CHART_NAME]
    assert "2 variants of tiny" in images[0].content


def test_the_chart_goes_along_and_is_of_the_same_figures(store: Store, run: Run, tmp_path: Path) -> None:
    publish(run, store, "q8_0", tmp_path / "share")
    other = Store(tmp_path / "other")
    assert run("pull", tmp_path / "share" / "tiny" / "q8_0", "--store", other.root).exit_code == 0
    pulled = other.find("tiny/q8_0")
    check_files(pulled, ListReporter())
    root = ElementTree.fromstring((pulled.folder / CHART_NAME).read_bytes())
    told = str(root.findtext("{http://www.w3.org/2000/svg}desc"))
    assert "q4_0: 0.8 MB, 0.03 (between 0.027 and 0.033), at worst 0.033 on code, the one to take." in told
    assert "q8_0: 1.5 MB, 0.004 " in told


def test_what_came_back_is_what_went_out_though_the_others_are_not_there(
    store: Store, run: Run, tmp_path: Path
) -> None:
    done = publish(run, store, "q8_0", tmp_path / "share")
    other = Store(tmp_path / "other")
    assert run("pull", tmp_path / "share" / "tiny" / "q8_0", "--store", other.root).exit_code == 0
    assert publish(run, other, "q8_0", tmp_path / "mirror")["digest"] == done["digest"]
    assert publish(run, other, "q8_0", tmp_path / "mirror", "--move-tag")["digest"] == done["digest"]


def test_one_more_variant_changes_no_publication_until_it_may(store: Store, run: Run, tmp_path: Path) -> None:
    done = publish(run, store, "q8_0", tmp_path / "share")
    measure(store, q5_k_s=0.02)
    again = publish(run, store, "q8_0", tmp_path / "share")
    assert (again["digest"], again["sent_files"]) == (done["digest"], 0)
    assert "| 0.0200 ± " not in card(store)
    moved = publish(run, store, "q8_0", tmp_path / "share", "--move-tag")
    assert moved["moved_from"] == done["digest"]
    assert "| q5_k_s | " in card(store)
    assert "| 0.0200 ± " in card(store)


def test_an_artifact_that_was_alone_stays_alone(built: Built, run: Run, tmp_path: Path) -> None:
    store = built.copy(tmp_path / "own")
    measure(store, q8_0=0.004)
    done = publish(run, store, "q8_0", tmp_path / "share")
    measure(store, q4_0=0.03)
    assert publish(run, store, "q8_0", tmp_path / "share")["digest"] == done["digest"]
    folder = store.find("tiny/q8_0").folder
    assert not (folder / CHART_NAME).exists()
    publish(run, store, "q8_0", tmp_path / "share", "--move-tag")
    assert (folder / CHART_NAME).exists()


def test_a_card_does_not_contradict_its_own_figures(store: Store, run: Run, tmp_path: Path) -> None:
    publish(run, store, "q8_0", tmp_path / "share")
    measure(store, q8_0=0.007)
    publish(run, store, "q8_0", tmp_path / "elsewhere")
    assert "| **q8_0** (this one) | 1.5 MB | 0.0070 ± 0.0007 | " in card(store)


def test_what_is_signed_stays_as_it_was_signed(store: Store, run: Run, tmp_path: Path, keys: Keys) -> None:
    artifact = store.find("tiny/q8_0")
    assert run("sign", "tiny/q8_0", "--key", keys.private, "--store", store.root).exit_code == 0
    assert "| q4_0 | " in card(store)
    measure(store, q5_k_s=0.02)
    publish(run, store, "q8_0", tmp_path / "share", "--move-tag")
    check_signature(artifact.folder, keys.public)
    publish(run, store, "q8_0", tmp_path / "share", "--move-tag", "--sign-key", keys.private)
    check_signature(artifact.folder, keys.public)
    assert "| 0.0200 ± " in card(store)


def test_another_source_is_no_sibling(store: Store, run: Run, tmp_path: Path) -> None:
    artifact = store.find("tiny/q4_0")
    changed = artifact.manifest.source.model_copy(update={"files": artifact.manifest.source.files[:1]})
    path = artifact.folder / "manifest.json"
    path.write_text(artifact.manifest.model_copy(update={"source": changed}).sealed().to_json(), encoding="utf-8")
    publish(run, store, "q8_0", tmp_path / "share")
    assert "## Compared" not in card(store)


def test_a_comparison_from_elsewhere_breaks_nothing(store: Store, run: Run, tmp_path: Path) -> None:
    publish(run, store, "q8_0", tmp_path / "share")
    artifact = store.find("tiny/q8_0")
    data = artifact.measurements()[NAME]
    nan = {"low": "nan", "high": "inf"}
    hostile = {**data["artifacts"][0], "variant": HOSTILE, "mean_kl": 1e308, "mean_kl_interval": nan}
    broken = [hostile, {**hostile, "mean_kl": "nan", "size_bytes": 1 << 62}, {**hostile, "mean_kl": -1.0}]
    update_measurements(store.root, artifact, {NAME: {**data, "artifacts": broken, "because": HOSTILE}})
    (tmp_path / "papers").mkdir()
    write_documents(artifact, tmp_path / "papers")
    ElementTree.parse(tmp_path / "papers" / CHART_NAME)
    reader = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = reader.parse((tmp_path / "papers" / CARD_NAME).read_text(encoding="utf-8"))
    flat = [inner for token in tokens for inner in (token, *(token.children or ()))]
    assert not [token.content for token in flat if token.type in ("html_block", "html_inline")]
    update_measurements(store.root, artifact, {NAME: {**data, "artifacts": broken * 100}})
    assert read_comparison(artifact.measurements()) is None
    write_documents(artifact, tmp_path / "papers")
    assert not (tmp_path / "papers" / CHART_NAME).exists()
