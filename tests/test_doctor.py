"""quantize doctor: what is said to be missing is what is missing, and nothing heavy is loaded to find out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import quantize.doctor
from quantize.doctor import lacking
from tests.conftest import Run

ROOT = Path(__file__).parent.parent


def without(monkeypatch: pytest.MonkeyPatch, *missing: str, **old: str) -> None:
    """Have some distributions not installed, or in an old version."""
    real = metadata.version

    def version(name: str) -> str:
        if name in missing:
            raise metadata.PackageNotFoundError(name)
        return old.get(name) or real(name)

    monkeypatch.setattr(quantize.doctor.metadata, "version", version)


def abilities(run: Run) -> dict[str, dict[str, object]]:
    result = run("doctor", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return {item["format"]: item for item in json.loads(result.stdout)["abilities"]}


def test_what_is_here(run: Run, tmp_path: Path) -> None:
    data = json.loads(run("doctor", "--json", "--store", tmp_path / "new" / "store").stdout)
    for name in ("torch", "transformers", "gguf"):
        assert data["versions"][name] == metadata.version(name)
    store, cache, scratch = data["folders"]
    assert store["path"] == str(tmp_path / "new" / "store")
    assert cache["path"] == os.environ["QUANTIZE_CACHE"]
    assert abs(store["free_bytes"] - shutil.disk_usage(tmp_path).free) < 1 << 30
    assert store["writable"] is cache["writable"] is scratch["writable"] is True
    assert not (tmp_path / "new").exists()
    for item in data["abilities"]:
        assert (item["build_lacks"], item["serve_lacks"], item["install"]) == ([], [], None)


def test_a_missing_engine_is_named_with_its_pip_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "bitsandbytes")
    found = abilities(run)
    item = found.pop("bitsandbytes")
    assert [text.partition(">")[0] for text in item["build_lacks"]] == ["bitsandbytes"]  # type: ignore[attr-defined]
    assert item["build_lacks"] == item["serve_lacks"]
    assert item["install"] == "pip install 'quantize[bnb]'"
    assert all(other["install"] is None for other in found.values())


def test_torch_is_what_all_formats_are_built_with(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF artifact is served without it all the same."""
    without(monkeypatch, "torch", "fastapi")
    found = abilities(run)
    assert all(any("torch" in text for text in item["build_lacks"]) for item in found.values())  # type: ignore[attr-defined]
    assert not any("torch" in text for text in found["gguf"]["serve_lacks"])  # type: ignore[attr-defined]
    assert found["gguf"]["install"] == "CMAKE_ARGS=-DGGML_NATIVE=OFF pip install --no-cache-dir 'quantize[gguf,serve]'"


def test_an_old_version_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, transformers="4.1")
    assert lacking(["torch"]) == ("transformers>=5",)
    assert lacking(["gguf"], only="llama-cpp-python") == ()


def test_an_extra_that_the_installation_does_not_know_is_not_met() -> None:
    """As after an update of an editable installation: its metadata is still that of before."""
    assert lacking(["torch", "new"]) == ("quantize[new], which this installation does not know",)


def test_the_table_is_for_people(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "llama-cpp-python")
    text = run("doctor").stdout
    assert "llama-cpp-python   not installed" in text
    assert "lacks llama-cpp-python>=" in text
    assert "CMAKE_ARGS=-DGGML_NATIVE=OFF pip install --no-cache-dir 'quantize[gguf]'" in text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_store_that_can_not_be_written(run: Run, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    store = json.loads(run("doctor", "--json", "--store", tmp_path / "store").stdout)["folders"][0]
    tmp_path.chmod(0o700)
    assert store["writable"] is False


def test_a_store_below_a_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = json.loads(run("doctor", "--json", "--store", tmp_path / "file" / "store").stdout)["folders"][0]
    assert store["writable"] is False


def test_nothing_heavy_is_loaded() -> None:
    code = (
        "import sys\nfrom quantize.cli import main\ntry:\n  main(['doctor', '--json'])\nexcept SystemExit:\n  pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'gguf', 'llama_cpp', 'fastapi', 'gptqmodel'}\n"
        "print('HEAVY', *sorted({name.partition('.')[0] for name in sys.modules} & heavy))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)
    assert result.stdout.rpartition("HEAVY")[2] == "\n"
