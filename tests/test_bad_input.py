"""Every bad recipe and every bad checkpoint ends with its own message, exit 2 or 3, and an untouched store.

bad_recipes/<name>.yaml has its message in <name>.txt: first the exit code, then stderr to the letter.
The checkpoints, with their messages, are in bad_checkpoints.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from quantize.formats import option_models
from quantize.testing import write_recipe
from tests.bad_checkpoints import BAD_CHECKPOINTS, BadCheckpoint
from tests.conftest import Run

FOLDER = Path(__file__).parent / "bad_recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def test_there_are_enough_of_them() -> None:
    assert len(NAMES) + len(BAD_CHECKPOINTS) >= 60
    assert sorted(path.stem for path in FOLDER.glob("*.txt")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_bad_recipe(name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)
    code, _, expected = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").partition("\n")
    result = run("build", f"{name}.yaml")
    assert result.stderr == expected.replace("{formats}", ", ".join(sorted(option_models())))
    assert f"exit {result.exit_code}" == code
    assert result.stdout == ""
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize("command", ["build", "plan"])
@pytest.mark.parametrize("bad", BAD_CHECKPOINTS, ids=lambda bad: bad.name)
def test_bad_checkpoint(bad: BadCheckpoint, command: str, run: Run, own_tiny: Path, tmp_path: Path) -> None:
    if command == "plan" and bad.only_build:
        pytest.skip("seen only when the weights are read")
    bad.damage(own_tiny)
    recipe = write_recipe(tmp_path / "recipe.yaml", own_tiny, [{"format": "gguf", "type": "Q8_0"}])
    result = run(command, recipe)
    assert bad.message in result.stderr
    assert result.exit_code == 3, result.stderr
    assert "Traceback" not in result.output
    assert "internal error" not in result.output
    assert not (tmp_path / "artifacts").exists()


def test_no_message_fits_two_damages() -> None:
    messages = [bad.message for bad in BAD_CHECKPOINTS]
    assert [text for text in messages if sum(text in other for other in messages) > 1] == []
