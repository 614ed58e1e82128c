"""quantize rebuild: identical or which tensor differs; and nothing around a build may change a byte of it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from quantize.events import Reporter
from quantize.formats.base import BuildResult, Context
from quantize.store.artifact import Artifact
from quantize.store.manifest import AcceptedRisk
from quantize.store.store import Store
from quantize.testing import FakeBuilder, TinyModel, make_checkpoint, write_recipe
from tests.conftest import Built, Run
from tests.elsewhere import rebuild_elsewhere


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where scratch folders go."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


@pytest.fixture
def artifact(own_tiny: Path, tmp_path: Path, run: Run, store: Store, fake: FakeBuilder) -> Artifact:
    assert run("build", write_recipe(tmp_path / "demo.yaml", own_tiny, [{"format": "fake"}])).exit_code == 0
    return store.find("demo/int8")


def state(root: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, by size and time."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}


def resealed(artifact: Artifact, to: Path, **changes: Any) -> Path:
    """A copy of an artifact whose manifest says something else, with a good digest."""
    folder = Path(shutil.copytree(artifact.folder, to))
    manifest = artifact.manifest.model_copy(update=changes).sealed()
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]) -> None:
    """Have the fake format write something else."""
    real = FakeBuilder.build

    def build(self: FakeBuilder, context: Context, reporter: Reporter) -> BuildResult:
        result = real(self, context, reporter)
        change(context.staging / "model.safetensors")
        return result

    monkeypatch.setattr(FakeBuilder, "build", build)


# --- what it says -----------------------------------------------------------------------------------------------------


def test_identical_and_nothing_is_left_or_touched(
    artifact: Artifact, scratch: Path, tmp_path: Path, run: Run, fake: FakeBuilder
) -> None:
    before = state(tmp_path / "artifacts")
    result = run("rebuild", "demo/int8")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{artifact.ref}: identical (2 files, {artifact.manifest.digest}, ")
    assert fake.built == ["int8", "int8"]
    assert state(tmp_path / "artifacts") == before
    assert list(scratch.iterdir()) == []


def test_it_needs_no_recipe_and_no_figures(artifact: Artifact, scratch: Path, run: Run) -> None:
    """The manifest alone: the recipe in the artifact is not read for anything but the path of a local source."""
    recipe = artifact.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("format: fake", "format: fake\n  bits: 3"))
    assert run("rebuild", "demo/int8").exit_code == 0
    for name in ("recipe.yaml", "measurements.json", "README.md", "evaluation.md"):
        (artifact.folder / name).unlink(missing_ok=True)
    data = json.loads(run("rebuild", "demo/int8", "--json", "--quiet").stdout)
    assert data["identical"] is True
    assert data["digest"] == data["rebuilt_digest"] == artifact.manifest.digest


def test_a_cache_that_was_spoilt_has_no_say(artifact: Artifact, scratch: Path, tmp_path: Path, run: Run) -> None:
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder")
    assert run("rebuild", "demo/int8").exit_code == 0


def test_a_tensor_that_differs_is_named_and_measured(
    artifact: Artifact, scratch: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def change(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([byte ^ 2]))

    spoil(monkeypatch, change)
    result = run("rebuild", "demo/int8", "--json", "--quiet", "--keep", tmp_path / "kept")
    assert result.exit_code == 3
    data = json.loads(result.stdout)
    (file,) = data["differences"]
    (tensor,) = file["tensors"]
    ours, theirs = (load_file(path / "model.safetensors") for path in (artifact.folder, tmp_path / "kept"))
    (name,) = [name for name in ours if not np.array_equal(ours[name], theirs[name])]
    assert (file["path"], tensor["tensor"], tensor["differing"]) == ("model.safetensors", name, 1)
    assert (tensor["max_difference"], tensor["values"]) == (2.0, ours[name].size)
    shown = run("rebuild", "demo/int8")
    assert (
        f"model.safetensors: differs\n  {name}: 1 of {ours[name].size:,} values differ, at most by 2\n" in shown.stdout
    )
    assert shown.stdout.endswith(" s)\n")
    assert ": different (2 files, the digests differ, " in shown.stdout


def test_a_header_that_differs(artifact: Artifact, scratch: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def pad(path: Path) -> None:
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        path.write_bytes((length + 8).to_bytes(8, "little") + raw[8 : 8 + length] + b" " * 8 + raw[8 + length :])

    spoil(monkeypatch, pad)
    result = run("rebuild", "demo/int8")
    assert result.exit_code == 3
    assert "in its header or the order of its tensors" in result.stdout


def test_versions_that_differ_come_first(artifact: Artifact, scratch: Path, tmp_path: Path, run: Run) -> None:
    """Other versions and the same bytes: the files are identical, the manifest is not."""
    tools = {"numpy": "1.0", "quantize": artifact.manifest.tools["quantize"], "gone": "2.0"}
    folder = resealed(artifact, tmp_path / "older", tools=tools)
    result = run("rebuild", folder)
    assert result.exit_code == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert [lines[2], lines[3]] == [["gone", "2.0", "not", "installed"], ["numpy", "1.0", np.__version__]]
    assert ": identical (2 files, the digests differ, " in result.stdout
    assert "warning: numpy is " in result.stderr
    data = json.loads(run("rebuild", folder, "--json", "--quiet").stdout)
    assert data["tools"][1] == {"tool": "numpy", "manifest": "1.0", "here": np.__version__}
    assert data["manifest_fields"] == []


def test_what_the_manifest_says_besides_files(artifact: Artifact, scratch: Path, tmp_path: Path, run: Run) -> None:
    result = run("rebuild", resealed(artifact, tmp_path / "other", bits_per_weight=1.5, build_key="0" * 64))
    assert result.exit_code == 3
    assert result.stdout.startswith("manifest: `bits_per_weight` differs\nmanifest: `build_key` differs\n")


def test_an_accepted_risk_is_a_person_s_word(artifact: Artifact, scratch: Path, tmp_path: Path, run: Run) -> None:
    risk = AcceptedRisk(reason="for a test", gates=("kl",))
    result = run("rebuild", resealed(artifact, tmp_path / "risky", accepted_risk=risk))
    assert (result.exit_code, ": identical (" in result.stdout) == (0, True)


def test_what_is_kept_is_a_whole_artifact(artifact: Artifact, scratch: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "kept" / "here"
    assert run("rebuild", "demo/int8", "--keep", folder).exit_code == 0
    assert run("diff", "demo/int8", folder).stdout == "no difference\n"
    assert (folder / "recipe.yaml").read_text() == (artifact.folder / "recipe.yaml").read_text()
    assert [item.name for item in folder.parent.iterdir()] == ["here"]
    assert run("verify", folder, "--hashes-only").exit_code == 0
    again = run("rebuild", "demo/int8", "--keep", folder)
    assert (again.exit_code, "is there already" in again.stderr) == (2, True)


# --- what it refuses --------------------------------------------------------------------------------------------------


def test_a_source_that_is_gone_can_be_named(
    artifact: Artifact, own_tiny: Path, scratch: Path, tmp_path: Path, run: Run
) -> None:
    moved = own_tiny.rename(tmp_path / "moved to")
    result = run("rebuild", "demo/int8", "--quiet")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "its source local:model is not found\n  run this where" in result.stderr
    assert run("rebuild", "demo/int8", "--source", moved).exit_code == 0
    result = run("rebuild", "demo/int8", "--source", make_checkpoint(tmp_path / "model", TinyModel(seed=9)))
    assert result.exit_code == 3
    assert "is not the one that it was built from (model.safetensors differs)" in result.stderr
    assert run("rebuild", "demo/int8", "--source", tmp_path / "nowhere").exit_code == 3
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (lambda item: (item.folder / "model.safetensors").write_bytes(b"x"), 3, "model.safetensors has 1 bytes"),
        (lambda item: (item.folder / "LICENSE").unlink(), 3, "LICENSE is missing"),
        (lambda item: (item.folder / "manifest.json").write_text("{"), 2, "no artifact 'demo/int8'"),
        (lambda item: shutil.rmtree(item.folder.parent), 2, "no artifact 'demo/int8'"),
    ],
)  # fmt: skip
def test_a_damaged_artifact(
    spoil: Callable[[Artifact], object], code: int, message: str, artifact: Artifact, scratch: Path, run: Run
) -> None:
    spoil(artifact)
    result = run("rebuild", "demo/int8")
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"format": "fake", "bits": 99}}, "the manifest's option `bits` is not one that fake has here"),
        ({"options": {"format": "fake", "new": 1}}, "the manifest's option `new` is not one that fake has here"),
        ({"options": {"format": "fake", "bits": 8, "fail": "check"}}, "the fake format refuses this checkpoint"),
        ({"size_bytes": 1 << 50}, "the disk is too small"),
    ],
)
def test_a_manifest_that_asks_for_what_is_not_here(
    changes: dict[str, Any], message: str, artifact: Artifact, scratch: Path, tmp_path: Path, run: Run
) -> None:
    result = run("rebuild", resealed(artifact, tmp_path / "other", **changes))
    assert (result.exit_code, result.stdout) == (3, "")
    assert message in result.stderr


def test_a_format_that_is_not_installed(artifact: Artifact, scratch: Path, tmp_path: Path, run: Run) -> None:
    result = run("rebuild", resealed(artifact, tmp_path / "other", format="exl9"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "the format 'exl9' is not installed here" in result.stderr


def test_a_build_that_fails_leaves_no_scratch(
    artifact: Artifact, scratch: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeBuilder, "build", lambda *_: 1 / 0)
    assert run("rebuild", "demo/int8").exit_code == 1
    assert list(scratch.iterdir()) == []


# --- a real format ----------------------------------------------------------------------------------------------------


def test_a_gguf_file_elsewhere(built: Built, tmp_path: Path) -> None:
    """The other formats are in test_contract.py."""
    artifact = built.store.find("tiny/q4_k_m")
    data = rebuild_elsewhere(artifact.folder, tmp_path)
    assert (data["tools"], data["manifest_fields"], data["differences"]) == ([], [], [])
    assert data["rebuilt_digest"] == data["digest"] == artifact.manifest.digest
