"""quantize estimate: every kind of target, the tables, the verdicts, wrong input. The arithmetic: test_estimate.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from quantize.estimate.vram import EstimateSettings, VramProfile, estimate
from quantize.model.shape import ModelShape
from quantize.testing import FakeBuilder, TinyModel, write_recipe
from tests.conftest import Built, Run


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.system.machine.nvidia_gpus", lambda: ())


@pytest.fixture
def built_store(built: Built, monkeypatch: pytest.MonkeyPatch) -> Built:
    monkeypatch.setenv("QUANTIZE_STORE", str(built.store.root))
    return built


def answers(run: Run, *args: object) -> list[dict[str, Any]]:
    result = run("estimate", *args, "--json")
    assert result.exit_code == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def test_an_artifact_s_weights_are_its_own_tensors(built_store: Built, run: Run) -> None:
    (found,) = answers(run, "tiny/q8_0")
    (path,) = built_store.root.glob("artifacts/tiny/q8_0/current/*.gguf")
    assert found["weights_bytes"] == sum(int(item.n_bytes) for item in gguf.GGUFReader(path).tensors)
    assert (found["format"], found["runtime"], found["kv_type"]) == ("gguf", "llama.cpp", "f16")
    assert found["kv_bytes_per_token"] == 2 * 2 * 2 * 64 * 2  # K and V x 2 blocks x 2 heads x 64 values x 2 bytes
    assert {(cell["context"], cell["concurrency"]) for cell in found["cells"]} == {(512, n) for n in (1, 2, 4, 8)}
    assert all(cell["expected_bytes"] < cell["upper_bytes"] for cell in found["cells"])
    assert found["verdict"] is None
    assert [item["weights_bytes"] for item in answers(run, path)] == [found["weights_bytes"]]


def test_a_checkpoint_by_its_headers(tiny: Path, run: Run) -> None:
    (found,) = answers(run, tiny, "--context", 512, "--concurrency", 2, "--kv-bits", 8, "--runtime", "transformers")
    shape = ModelShape.from_config(TinyModel().config("F16"))
    (cell,) = found["cells"]
    expected = estimate(
        shape, found["weights_bytes"], profile=VramProfile(), settings=EstimateSettings("transformers", "q8_0"),
        context=512, concurrency=2,
    )  # fmt: skip
    assert (cell["expected_bytes"], cell["upper_bytes"]) == (expected.expected_bytes, expected.upper_bytes)
    assert found["weights_bytes"] == sum(array.size for array in TinyModel().weights().values()) * 2


def test_a_recipe_stands_for_its_variants(fake: FakeBuilder, tiny: Path, tmp_path: Path, run: Run) -> None:
    path = write_recipe(tmp_path / "demo.yaml", tiny, [{"format": "fake"}, {"format": "fake", "bits": 4}])
    found = answers(run, path)
    assert [item["name"] for item in found] == ["demo/int8", "demo/int4"]
    assert fake.built == [], "headers are enough"
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(
    ("card", "word"),
    [(["--vram", "8G"], "fits"), (["--gpu", "RTX 4060 8GB"], "fits"), (["--vram", "500MiB"], "tight"),
     (["--vram", "300MiB"], "does not fit")],
)  # fmt: skip
def test_a_card_gets_a_verdict(card: list[str], word: str, built_store: Built, run: Run) -> None:
    (found,) = answers(run, "tiny/f16", *card)
    assert found["verdict"]["word"] == word
    assert found["cells"][0]["verdict"] == word
    text = run("estimate", "tiny/f16", *card).stdout
    assert f": {word}: " in text
    assert "AT ONCE" in text
    assert "RAM for loading" in text
    assert ("try: " in text) == (word != "fits")


def test_advice_is_to_be_had_from_other_variants(built_store: Built, run: Run) -> None:
    """A card on which only a smaller build of the same model fits."""
    (large,) = answers(run, "tiny/f16", "--context", 512, "--concurrency", 1)
    (small,) = answers(run, "tiny/q4_0", "--context", 512, "--concurrency", 1)
    between = (large["cells"][0]["upper_bytes"] + small["cells"][0]["upper_bytes"]) // 2
    (found,) = answers(run, "tiny/f16", "--context", 512, "--concurrency", 1, "--vram", between * 10 // 9)
    assert found["verdict"]["word"] == "tight"
    assert any(text.startswith("variant tiny/") for text in found["verdict"]["suggestions"])


def test_this_machine_s_gpu_is_taken_if_none_is_named(
    built_store: Built, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantize.system.gpus import LocalGpu

    monkeypatch.setattr("quantize.system.machine.nvidia_gpus", lambda: (LocalGpu("A card", 2**33, 0),))
    (found,) = answers(run, "tiny/q8_0")
    assert found["card"] == {"name": "A card", "vram_bytes": 2**33}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tiny/none"], "no recipe, model's folder, model's file or artifact 'tiny/none'"),
        (["tiny/q8_0", "--context", "4096"], "4,096 tokens are more than the model's own context of 512"),
        (["tiny/q8_0", "--gpu", "RTX 4600"], "unknown card 'RTX 4600'"),
        (["tiny/q8_0", "--vram", "much"], "'much' is no size"),
        (["tiny/q8_0", "--context", "0"], "0 is not in the range x>=1"),
        (["tiny/q8_0", "--kv-bits", "3"], "'3' is not one of"),
        (["tiny/q8_0", "--runtime", "ollama"], "'ollama' is not one of"),
    ],
)
def test_wrong_input(args: list[str], message: str, built_store: Built, run: Run) -> None:
    result = run("estimate", *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_a_folder_that_is_no_model(run: Run, tmp_path: Path) -> None:
    result = run("estimate", tmp_path)
    assert result.exit_code == 2
    assert f"{tmp_path}: a folder with neither manifest.json nor config.json" in result.stderr
