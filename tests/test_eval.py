"""quantize eval: what is printed, what is recorded, what is moved, and wrong input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from quantize.store.artifact import REFUSED
from quantize.store.store import Store
from quantize.testing import TinyModel, make_checkpoint
from tests.conftest import Run
from tests.test_gates import (  # noqa: F401 - fixtures
    IMPOSSIBLE,
    Q4,
    Q8,
    Write,
    _in_this_process,
    outcome,
    record,
    write,
)
from tests.test_rebuild import resealed
from tests.test_verify import flip

pytest.importorskip("torch")
pytest.importorskip("llama_cpp")


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe that an artifact carries finds its prompts from the working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def unmeasured(write: Write, run: Run, at_home: None) -> Path:  # noqa: F811 - the fixture
    """A recipe whose two variants are built, and not evaluated; its folder is the working folder."""
    path = write(Q8, Q4)
    assert run("build", path, "--no-eval").exit_code == 0
    return path


def test_a_recipe_s_artifacts_are_measured_and_recorded(unmeasured: Path, run: Run, store: Store) -> None:
    result = run("eval", unmeasured, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [item["artifact"].split("@")[0] for item in found] == ["tiny/q4_k_m", "tiny/q8_0"]
    divergence = [item["evaluation"]["quality"]["mean_kl"] for item in found]
    assert divergence[0] > divergence[1] > 0
    for item in found:
        assert item["recorded"]
        assert record(item["folder"]) == item["evaluation"]
    table = run("eval", "tiny/q8_0").stdout
    numbers = found[1]["evaluation"]["quality"]
    for text in (
        f"{numbers['perplexity_ratio']:.4f}",
        f"{numbers['p99_kl']:.4f}",
        " GOLDEN ",
        "the source passes 0 of 0 golden prompts",
    ):
        assert text in table
    assert {item.manifest.variant for item in store.artifacts() if store.is_current(item)} == {"q4_k_m", "q8_0"}


def test_options_that_are_not_known_here_are_named(
    unmeasured: Path, run: Run, store: Store, tmp_path: Path
) -> None:
    """As of an artifact that a newer version built: nothing is said of its quality, and nothing is written."""
    artifact = store.find("tiny/q8_0")
    options = {**artifact.manifest.options, "later": True}
    copy = resealed(artifact, tmp_path / "newer", options=options)
    before = (copy / "measurements.json").read_bytes()
    result = run("eval", copy)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "the manifest's option `later` is not one that gguf has here" in result.stderr
    assert (copy / "measurements.json").read_bytes() == before


def test_what_the_gates_refuse_is_moved_aside(write: Write, run: Run, store: Store, at_home: None) -> None:  # noqa: F811
    item, _ = outcome(run, write(gates=IMPOSSIBLE), "--no-eval")
    result = run("eval", "tiny/q8_0")
    assert result.exit_code == 3
    assert "refused: tiny/q8_0 is refused: KL divergence: mean" in result.stderr
    assert store.artifacts() == []
    (refused,) = store.refused()
    assert refused.folder.parent.name == REFUSED
    assert refused.folder.name == Path(item["folder"]).name


def test_other_text_than_the_recipe_s_is_only_shown(unmeasured: Path, run: Run, store: Store, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("A text of my own, that says nothing new. " * 60)
    result = run("eval", "tiny/q8_0", "--text", tmp_path / "mine.txt", "--window", 64, "--no-golden", "--json")
    assert result.exit_code == 0, result.stderr
    (item,) = json.loads(result.stdout)
    assert (item["recorded"], item["evaluation"]["quality"]["text_name"]) == (False, "mine.txt")
    assert item["evaluation"]["golden"] is None
    assert "evaluation" not in store.find("tiny/q8_0").measurements()


def test_an_artifact_in_no_store_is_measured_where_it_is(unmeasured: Path, run: Run, store: Store) -> None:
    folder = Path(shutil.copytree(store.find("tiny/q8_0").folder, store.root.parent / "pulled"))
    shutil.rmtree(store.root)
    assert run("eval", folder).exit_code == 0
    assert record(folder)["verdict"] == "insufficient evidence"


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (["tiny/q9"], "no artifact or recipe 'tiny/q9'", 2),
        (["none.yaml"], "none.yaml: no such file", 2),
        (["tiny/q8_0", "--text", "none.txt"], "--text none.txt: no such file", 2),
        (["tiny/q8_0", "--text", "EMPTY"], "empty.txt: no text to measure on", 2),
        (["tiny/q8_0", "--text", "SHORT"], "tokens are less than one window of 128", 2),
        (["tiny/q8_0", "--golden", "WRONG"], "wrong.yaml:2:44: `kind`: Input should be", 2),
        (["tiny/q8_0", "--golden", "NONE"], "/none: no such file", 2),
        ([], "Missing argument 'ARTIFACT|RECIPE...'", 2),
    ],
)
def test_wrong_input(
    options: list[str], message: str, code: int, unmeasured: Path, run: Run, tmp_path: Path
) -> None:  # fmt: skip
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "wrong.yaml").write_text("name: wrong\nprompts: [{id: a, prompt: x, grade: {kind: guess}}]\n")
    files = {"EMPTY": "empty.txt", "SHORT": "short.txt", "WRONG": "wrong.yaml", "NONE": "none"}
    given = [str(tmp_path / files[option]) if option in files else option for option in options]
    result = run("eval", *given)
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    assert message in result.stderr


def test_a_source_that_is_another_model_is_refused(unmeasured: Path, run: Run, store: Store, tmp_path: Path) -> None:
    """The recipe in the artifact names a model with the same name and other weights."""
    other = make_checkpoint(tmp_path / "elsewhere" / "tiny", TinyModel(seed=5))
    path = store.find("tiny/q8_0").folder / "recipe.yaml"
    text = path.read_text()
    (model,) = [line.split("model: ")[1] for line in text.splitlines() if "model: " in line]
    path.write_text(text.replace(model, str(other)))
    result = run("eval", "tiny/q8_0")
    assert result.exit_code == 3
    assert "the source local:tiny is not the one that it was built from" in result.stderr


def test_files_that_are_not_the_manifest_s_are_not_measured(unmeasured: Path, run: Run, store: Store) -> None:
    flip(store.find("tiny/q8_0"))
    result = run("eval", "tiny/q8_0")
    assert result.exit_code == 3
    assert "was altered: its sha256 is not the manifest's" in result.stderr
