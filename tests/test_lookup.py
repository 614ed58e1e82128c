"""Names of recipes, calibration specs and golden prompts: which file each one means, and that it is said."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from quantize.build.judge import Judge
from quantize.build.lockfile import lock_path
from quantize.calibration.datasets import find_dataset
from quantize.errors import RecipeError, UsageError
from quantize.events import ListReporter
from quantize.formats import option_models
from quantize.model.source import pin_source
from quantize.recipe.model import load_calibration, load_recipe
from quantize.system.cache import Cache
from quantize.system.lookup import (
    CALIBRATION,
    DATA,
    GOLDEN,
    RECIPES,
    builtin_files,
    find_data,
    find_recipe,
)
from quantize.testing import write_recipe
from tests.conftest import Run

ROOT = Path(__file__).parent.parent
Q8 = [{"format": "gguf", "type": "Q8_0"}]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, as after pip install."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def written(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("kind", [RECIPES, CALIBRATION, GOLDEN])
def test_the_package_has_what_the_clone_has(kind: str) -> None:
    theirs = {path.stem: path.read_bytes() for path in (ROOT / kind).glob("*.yaml")}
    assert {name: path.read_bytes() for name, path in builtin_files(kind).items()} == theirs
    assert theirs


def test_every_recipe_of_the_package_loads_and_has_the_name_of_its_file() -> None:
    for name, path in builtin_files(RECIPES).items():
        assert load_recipe(path, option_models()).name == name


def test_a_recipe_by_name(here: Path) -> None:
    assert find_recipe("smollm2-135m").path == DATA / "recipes" / "smollm2-135m.yaml"
    assert find_recipe("builtin:smollm2-135m").note is None
    mine = written(here / "recipes", "mine.yml", "name: mine\n")
    assert find_recipe("mine").path.samefile(mine)


def test_a_file_of_the_users_wins_and_that_is_said(here: Path, tiny: Path, run: Run) -> None:
    (here / "recipes").mkdir()
    write_recipe(here / "recipes" / "smollm2-135m.yaml", tiny, Q8)
    found = find_recipe("smollm2-135m")
    assert found.path == Path("recipes/smollm2-135m.yaml")
    assert found.note is not None
    assert "recipes/smollm2-135m.yaml; `builtin:smollm2-135m` is the one that comes with quantize" in found.note
    result = run("plan", "smollm2-135m", "--json")
    assert [item["name"] for item in json.loads(result.stdout)["variants"]] == ["q8_0"]
    assert f"note: {found.note}" in result.stderr
    assert "note:" not in run("plan", "smollm2-135m", "--quiet").stderr


def test_the_package_s_own_file_in_the_clone_is_no_second_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = find_recipe("smollm2-135m")
    assert (found.path, found.note) == (Path("recipes/smollm2-135m.yaml"), None)


@pytest.mark.parametrize("text", ["smolm2-135m", "builtin:smolm2-135m"])
def test_no_recipe_of_that_name(text: str) -> None:
    with pytest.raises(UsageError, match=f"no recipe '{text}'") as caught:
        find_recipe(text)
    assert caught.value.hint is not None
    assert "did you mean `smollm2-135m`?" in caught.value.hint


@pytest.mark.parametrize("text", ["no/such/recipe", "no-such.yaml", "", "..", "a" * 5000, "x\0y"])
def test_what_is_no_name_is_left_to_the_reader(text: str) -> None:
    try:
        path = find_recipe(text).path
    except UsageError:
        return
    with pytest.raises(RecipeError):
        load_recipe(path, option_models())


def test_a_folder_of_that_name_hides_no_recipe(here: Path) -> None:
    (here / "smollm2-135m").mkdir()
    assert find_recipe("smollm2-135m").path.is_relative_to(DATA)


def test_a_calibration_by_name_and_by_the_package_s_path(tiny: Path, here: Path) -> None:
    wanted = load_calibration(DATA / "calibration" / "ultrachat.yaml")
    for number, text in enumerate(("ultrachat", "calibration/ultrachat.yaml", "builtin:ultrachat")):
        recipe = load_recipe(write_recipe(here / f"r{number}.yaml", tiny, Q8, calibration=text), option_models())
        assert (recipe.calibration, recipe.notes) == (wanted, ())


def test_a_calibration_of_the_users_wins(tiny: Path, here: Path, run: Run) -> None:
    written(here / "calibration", "ultrachat.yaml", "{dataset: python-docs, samples: 3}\n")
    path = write_recipe(here / "mine.yaml", tiny, Q8, calibration="ultrachat")
    recipe = load_recipe(path, option_models())
    assert recipe.calibration is not None
    assert recipe.calibration.samples == 3
    (note,) = recipe.notes
    assert f"`ultrachat` is taken to mean {here}/calibration/ultrachat.yaml" in note
    assert f"note: {note}" in run("plan", path).stderr
    other = load_recipe(write_recipe(here / "other.yaml", tiny, Q8, calibration="builtin:ultrachat"), option_models())
    assert (other.calibration, other.notes) == (load_calibration(DATA / "calibration" / "ultrachat.yaml"), ())


def test_an_unknown_calibration_is_named_with_those_that_there_are(tiny: Path, here: Path) -> None:
    with pytest.raises(RecipeError, match="no such file or name: ultrachta") as caught:
        load_recipe(write_recipe(here / "mine.yaml", tiny, Q8, calibration="ultrachta"), option_models())
    assert caught.value.hint == "did you mean `ultrachat`?"


def test_identity_has_no_path_of_the_installation(tiny: Path, here: Path) -> None:
    """The text that comes with the package is a file of a name and a content, wherever Python put it."""
    recipe = load_recipe(write_recipe(here / "mine.yaml", tiny, Q8, calibration="vietnamese"), option_models())
    assert recipe.calibration is not None
    assert os.path.isabs(recipe.calibration.dataset)
    identity = find_dataset(recipe.calibration, recipe.path.parent).identify()
    assert identity["dataset"] == "vietnamese.txt"
    assert str(DATA) not in json.dumps(identity)


def test_golden_prompts_of_the_package(tiny: Path, here: Path, cache: Cache) -> None:
    def asked(**evaluation: object) -> list[Path]:
        recipe = load_recipe(write_recipe(here / "mine.yaml", tiny, Q8, evaluation=evaluation), option_models())
        from quantize.formats.base import RunLimits

        return list(Judge(recipe, pin_source(recipe, cache, ListReporter()), cache, RunLimits()).golden)

    assert asked() == [DATA / "calibration" / "golden"]
    assert asked(golden=["english"]) == [DATA / "calibration" / "golden" / "english.yaml"]
    assert asked(golden=[]) == []
    mine = written(here / "calibration" / "golden", "mine.yaml", "name: mine\n")
    assert asked() == [mine.parent]
    with pytest.raises(UsageError, match="no such golden prompts: englsh") as caught:
        asked(golden=["englsh"])
    assert "by name there are: english, vietnamese" in str(caught.value.hint)


def test_the_lock_of_a_recipe_of_the_package_is_written_here(here: Path) -> None:
    assert lock_path(find_recipe("smollm2-135m").path) == Path("smollm2-135m.lock")
    assert lock_path(here / "mine.yaml") == here / "mine.yaml.lock"


def test_list_recipes_without_a_folder(here: Path, tiny: Path, run: Run) -> None:
    rows = json.loads(run("list", "recipes", "--json").stdout)
    assert [row["path"] for row in rows] == [f"builtin:{name}" for name in builtin_files(RECIPES)]
    (here / "recipes").mkdir()
    write_recipe(here / "recipes" / "mine.yaml", tiny, Q8)
    rows = json.loads(run("list", "recipes", "--json").stdout)
    assert rows[0] == {
        "path": "recipes/mine.yaml",
        "name": "mine",
        "model": str(tiny),
        "variants": ["q8_0"],
        "error": None,
    }
    assert len(rows) == 1 + len(builtin_files(RECIPES))


def test_a_text_of_the_package_is_found_for_a_rebuild(here: Path) -> None:
    """By the name that manifests have."""
    assert find_data("vietnamese", here, CALIBRATION) is not None
    assert (DATA / CALIBRATION / "vietnamese.txt").is_file()
