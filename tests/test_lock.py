"""quantize lock and build --locked: what is pinned, and everything that may differ from it, by name."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantize.build.lockfile import Lock, hold, lock_path, make_lock, read_lock
from quantize.calibration.text import load_calibration_set
from quantize.events import EventKind, ListReporter
from quantize.formats import option_models
from quantize.recipe.model import load_recipe
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.system.processor import device_name
from quantize.testing import FakeBuilder, make_checkpoint, write_recipe
from tests.bad_checkpoints import change_json
from tests.conftest import Run
from tests.test_source import COMMIT, FakeHub

FAKE = [{"format": "fake", "bits": 8}, {"format": "fake", "bits": 4}]


@pytest.fixture
def recipe(own_tiny: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "demo.yaml", own_tiny, FAKE)


@pytest.fixture
def locked(recipe: Path, fake: FakeBuilder, run: Run) -> Path:
    """The recipe, locked."""
    assert run("lock", recipe).exit_code == 0
    return recipe


def edit(recipe: Path, **changes: Any) -> None:
    data = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(data | changes, sort_keys=False))


def refusal(run: Run, recipe: Path, *options: str) -> str:
    """What `build --locked` refuses with; nothing may have been built."""
    result = run("build", recipe, "--locked", "--quiet", *options)
    assert (result.exit_code, result.stdout) == (3, ""), result.stderr
    assert not (recipe.parent / "artifacts").exists()
    return result.stderr


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake")
def test_the_lock_pins_by_hash(recipe: Path, own_tiny: Path, run: Run) -> None:
    result = run("lock", recipe)
    path = recipe.with_name("demo.yaml.lock")
    assert result.stdout.startswith(f"{path}: written (2 variants, sha256:")
    data = yaml.safe_load(path.read_text())
    files = {item["path"]: item["sha256"] for item in data["source"]["files"]}
    weights = hashlib.sha256((own_tiny / "model.safetensors").read_bytes()).hexdigest()
    assert files["model.safetensors"] == weights
    assert set(files) == {"LICENSE", "README.md", "config.json", "model.safetensors", "tokenizer.json"} | {
        "tokenizer_config.json"
    }
    assert data["variants"]["int4"]["options"] == {"format": "fake", "bits": 4, "fail": None}
    assert set(data["variants"]["int4"]["tools"]) == {"numpy", "quantize"}
    plan = {item["name"]: item["build_key"] for item in json.loads(run("plan", recipe, "--json").stdout)["variants"]}
    assert {name: item["build_key"] for name, item in data["variants"].items()} == plan
    assert run("build", recipe, "--locked").exit_code == 0


@pytest.mark.usefixtures("fake")
def test_the_same_bytes_from_another_folder_and_order(recipe: Path, tmp_path: Path, run: Run) -> None:
    run("lock", recipe)
    other = tmp_path / "other" / "place"
    other.mkdir(parents=True)
    shutil.copytree(tmp_path / "model", other / "model")
    write_recipe(other / "demo.yaml", other / "model", FAKE[::-1])
    run("lock", other / "demo.yaml")
    text = (other / "demo.yaml.lock").read_text()
    assert text == lock_path(recipe).read_text()
    assert str(tmp_path) not in text
    assert re.search(r"20\d\d-\d\d", text) is None


def test_written_again_it_says_what_changed(locked: Path, own_tiny: Path, run: Run) -> None:
    assert ": unchanged (2 variants" in run("lock", locked).stdout
    before = lock_path(locked).read_bytes()
    change_json(own_tiny / "config.json", rope_theta=500_000.0)
    result = run("lock", locked, "--json")
    assert [item["what"] for item in json.loads(result.stdout)["changes"]] == ["source.files.config.json"]
    assert lock_path(locked).read_bytes() != before
    assert run("build", locked, "--locked").exit_code == 0


@pytest.mark.usefixtures("fake")
def test_a_folder_that_can_not_be_written(recipe: Path, run: Run) -> None:
    lock_path(recipe).mkdir()
    result = run("lock", recipe, "--quiet")
    assert result.exit_code == 1
    assert "demo.yaml.lock: can't be written" in result.stderr
    assert [item.name for item in recipe.parent.iterdir() if item.suffix == ".tmp"] == []


# --- refusing ---------------------------------------------------------------------------------------------------------


def test_every_difference_is_named(locked: Path, own_tiny: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    change_json(own_tiny / "config.json", rope_theta=500_000.0)
    (own_tiny / "NOTICE").write_text("x")
    variants = [{"format": "fake", "name": "int8", "bits": 6}, {"format": "fake", "bits": 5}]
    edit(locked, variants=variants, source={"model": str(own_tiny), "license": "mit"})
    monkeypatch.setattr(FakeBuilder, "tools", lambda *_: ["numpy", "pyyaml"])
    message = refusal(run, locked)
    assert "7 things are not as it says" in message
    for line in (
        "source.files.config.json: sha256 ",
        "source.files.NOTICE: nothing in the lock, sha256 ",
        "source.license: apache-2.0 in the lock, mit now",
        "variants.int4: a fake variant in the lock, nothing now",
        "variants.int5: nothing in the lock, a fake variant now",
        "variants.int8.options.bits: 8 in the lock, 6 now",
        "variants.int8.tools.pyyaml: nothing in the lock, ",
    ):
        assert f"\n  {line}" in message
    assert f"quantize lock {locked}" in message


def test_a_tool_in_another_version(locked: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.store.manifest.metadata.version", lambda _: "9.9")
    message = refusal(run, locked)
    assert re.search(r"variants\.int8\.tools\.numpy: [\d.]+ in the lock, 9\.9 now", message)


def test_a_build_key_by_itself_is_named_too(locked: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another way to make keys: nothing else tells it."""
    monkeypatch.setattr(import_module("quantize.build.plan"), "BUILD_KEY_VERSION", 99)
    assert "variants.int4.build_key: " in refusal(run, locked)


def test_what_is_built_by_the_lock_stays_up_to_date(locked: Path, run: Run) -> None:
    for state in ("built", "up to date"):
        result = run("build", locked, "--locked", "--json")
        assert [item["state"] for item in json.loads(result.stdout)] == [state, state]


def test_only_the_wanted_variants_count(locked: Path, run: Run) -> None:
    edit(locked, variants=[FAKE[0], {"format": "fake", "bits": 5}])
    assert "variants.int5: " in refusal(run, locked, "--only", "int5")
    assert run("build", locked, "--locked", "--only", "int8").exit_code == 0


def test_words_in_the_recipe_that_change_no_artifact_are_free(locked: Path, run: Run) -> None:
    edit(locked, description="better words", gates={"max_kl": 0.5})
    assert run("build", locked, "--locked").exit_code == 0


def test_a_lock_of_another_recipe(locked: Path, run: Run) -> None:
    edit(locked, name="other")
    assert "the lock is of another recipe: of demo, not other" in refusal(run, locked)


# --- locks that can't be read -----------------------------------------------------------------------------------------


def change(name: str, value: object) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        data = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump(data | {name: value}))

    return write


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), r"demo\.yaml\.lock: no such file\n  write it first: quantize lock .*demo\.yaml"),
        (lambda path: path.write_text(path.read_text().replace("bits: 4", "bits: 3")), "was edited: its content does"),
        (change("digest", "sha256:00"), "was edited"),
        (change("recipe", "other"), "was edited"),
        (change("schema_version", 2), "schema version 2 is newer than this program\n  upgrade quantize"),
        (change("extra", 1), r"lock:\d+:1: unknown key `extra`"),
        (change("variants", [1]), r"`variants`: expected keys and values here"),
        (change("schema_version", float("nan")), "schema_version"),
        (lambda path: path.write_text("- 1\n"), "expected keys and values here, found a list"),
        (lambda path: path.write_text("a: [\n"), "not valid YAML"),
        (lambda path: path.write_text("<<<<<<< ours\n"), "expected keys and values here, found a single value"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "not UTF-8 text"),
        (lambda path: path.write_text(""), "the file is empty"),
        (lambda path: (path.unlink(), path.mkdir()), "this is a folder, not a file"),
    ],
)  # fmt: skip
def test_a_lock_that_is_none_exits_2(spoil: Callable[[Path], object], message: str, locked: Path, run: Run) -> None:
    spoil(lock_path(locked))
    result = run("build", locked, "--locked", "--quiet")
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.search(message, result.stderr), result.stderr
    assert not (locked.parent / "artifacts").exists()


def test_numbers_that_json_has_not_are_an_edit(locked: Path, run: Run) -> None:
    path = lock_path(locked)
    found = {
        ".nan": "was edited",
        "12345678901234567890123": "more than 9,007,199,254,740,991",
        "2020-01-01": "was edited",
    }
    for text, expected in found.items():
        before = path.read_text()
        path.write_text(before.replace("bits: 4", f"bits: {text}"))
        assert expected in run("build", locked, "--locked").stderr
        path.write_text(before)


# --- the hub, and calibration text ------------------------------------------------------------------------------------


def test_a_branch_that_moved_on_is_built_at_its_locked_commit(
    tiny: Path, tmp_path: Path, workspace: Workspace, fake: FakeBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock says which commit `main` was; the hub is not even asked again. Another branch is another thing."""
    hub = FakeHub(monkeypatch, tiny)
    path = tmp_path / "hub.yaml"
    path.write_text("name: hub\nsource: {model: org/tiny}\nvariants: [{format: fake}]\n")
    recipe = load_recipe(path, option_models())
    lock = make_lock(recipe, workspace)
    assert (lock.source.asked, lock.source.revision, hub.asked) == (None, COMMIT, ["org/tiny@main"])
    assert hold(lock, recipe, workspace).source.revision == COMMIT
    assert len(hub.asked) == 1
    path.write_text(path.read_text().replace("org/tiny", "org/tiny, revision: v2"))
    with pytest.raises(Exception, match=r"source\.asked: nothing in the lock, v2 now"):
        hold(lock, load_recipe(path, option_models()), workspace)


@pytest.mark.filterwarnings("ignore")
def test_the_text_is_pinned_by_its_token_ids(tmp_path: Path, run: Run) -> None:
    model = make_checkpoint(tmp_path / "tiny")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {index}: the quick brown fox jumps over the dog." for index in range(9)))
    calibration = {"dataset": "text.txt", "samples": 8, "sequence_length": 64}
    path = write_recipe(tmp_path / "demo.yaml", model, [{"format": "gptq", "group_size": 64}], calibration=calibration)
    assert run("lock", path).exit_code == 0
    lock = read_lock(lock_path(path))
    recipe = load_recipe(path, option_models())
    assert recipe.calibration is not None
    assert lock.calibration is not None
    found = load_calibration_set(recipe.calibration, tmp_path, model)
    assert (lock.calibration.hash, lock.calibration.sequences) == (found.hash, 8)
    assert lock.calibration.identity["content"] == hashlib.sha256(text.read_bytes()).hexdigest()

    before = text.read_text()
    text.write_text(before.replace("fox", "cat"))
    message = refusal(run, path)
    assert "one thing is not as it says\n  calibration.identity.content: " in message
    text.write_text(before)
    edit(path, calibration=calibration | {"samples": 4, "sequence_length": 32})
    message = refusal(run, path)
    assert "calibration.identity.samples: 8 in the lock, 4 now" in message
    assert "calibration.identity.sequence_length: 64 in the lock, 32 now" in message
    edit(path, calibration=calibration)
    forged = lock.model_copy(update={"calibration": lock.calibration.model_copy(update={"hash": "0" * 64})})
    write(path, forged)
    assert "calibration.hash: 0000" in refusal(run, path)
    write(path, lock.model_copy(update={"calibration": None}))
    assert "calibration.hash: nothing in the lock" in refusal(run, path)


@pytest.mark.filterwarnings("ignore")
def test_another_kind_of_processor_is_told_and_refuses_nothing(tmp_path: Path, run: Run) -> None:
    """Also a lock of before the kind was recorded is held to all the rest."""
    model = make_checkpoint(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the dog. " * 99)
    calibration = {"dataset": "text.txt", "samples": 8, "sequence_length": 64}
    path = write_recipe(tmp_path / "demo.yaml", model, [{"format": "gptq", "group_size": 64}], calibration=calibration)
    assert run("lock", path).exit_code == 0
    lock, recipe = read_lock(lock_path(path)), load_recipe(path, option_models())
    assert lock.calibration is not None
    here = device_name("cpu")
    assert lock.calibration.device == here
    told = f"locked on another kind of processor: another there, {here} here; calibrated variants may get other bytes"
    for device, words in ((here, []), ("another", [f"{told}, text by the model itself may be another"]), (None, [])):
        write(path, lock.model_copy(update={"calibration": lock.calibration.model_copy(update={"device": device})}))
        reporter = ListReporter()
        workspace = Workspace(Store(tmp_path / "artifacts"), Cache(tmp_path / "cache"), reporter)
        hold(read_lock(lock_path(path)), recipe, workspace, device="cpu")
        assert [event.text for event in reporter.events if event.kind is EventKind.WARNING] == words


def write(recipe: Path, lock: Lock) -> None:
    """A lock with a good digest."""
    lock_path(recipe).write_text(lock.model_copy(update={"digest": lock.computed_digest()}).to_yaml())


@pytest.mark.filterwarnings("ignore")
def test_text_that_a_recipe_does_not_name_is_locked_too(tiny: Path, tmp_path: Path, run: Run) -> None:
    path = write_recipe(tmp_path / "demo.yaml", tiny, [{"format": "gptq", "group_size": 64}])
    assert run("lock", path, "--quiet").exit_code == 0
    lock = read_lock(lock_path(path))
    assert lock.calibration is not None
    names = [part["dataset"] for part in lock.calibration.identity["mix"]]
    assert names == ["prose.txt", "code.txt", "self-chat", "vietnamese.txt"]
