"""Text that the model writes for its own calibration: written on the GPU of the pass where it fits, an emulated one."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.calibration.text import CalibrationSet
from quantize.calibration.writing import gpu_writing_bytes, read_text
from quantize.errors import PlanError
from quantize.events import ListReporter
from quantize.model.checkpoint import open_checkpoint
from quantize.recipe.calibration import CalibrationSpec
from quantize.runtimes.transformers import load as loading
from quantize.testing import write_recipe
from tests.conftest import Run
from tests.emulated import emulated_gpu, put_on_gpu
from tests.test_emulated_gpu import VARIANTS, build_in_process

LOAD = loading.load_causal_lm
LENGTH = 48


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    """Loaded where no GPU is to be seen: what libraries do beside one is not meant here."""
    made = LOAD(tiny, dtype=torch.float32)
    made.set_attn_implementation("eager")
    return made


@pytest.fixture
def asked(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Where the model was loaded, and in which type."""
    found: list[tuple[str, str]] = []

    def load(_folder: Path, device: str = "cpu", *, dtype: Any = "auto") -> Any:
        found.append((device, dtype))
        return model if device == "cpu" else put_on_gpu(deepcopy(model))

    monkeypatch.setattr(loading, "load_causal_lm", load)
    return found


def text(tiny: Path, folder: Path, device: str, dataset: str = "self") -> tuple[CalibrationSet, list[str]]:
    reporter = ListReporter()
    spec = CalibrationSpec.model_validate({"dataset": dataset, "samples": 3, "sequence_length": LENGTH})
    found = read_text(spec, folder, open_checkpoint(tiny), device, reporter)
    return found, [event.text for event in reporter.events]


@pytest.mark.parametrize("dataset", ["self", "self-chat"])
def test_the_model_writes_on_the_gpu(
    dataset: str, tiny: Path, tmp_path: Path, asked: list[tuple[str, str]]
) -> None:
    with emulated_gpu() as ledger:
        (first, said), (again, _) = (text(tiny, tmp_path, "cuda", dataset) for _ in range(2))
        assert ledger.launches > 1000
        assert ledger.to_host < 60_000, "tokens, no scores"
    assert asked == [("cuda", "auto")] * 2
    assert said == ["the model writes its text on cuda"]
    assert first == again
    assert [len(ids) for ids in first.token_ids] == [LENGTH] * 3


def test_on_the_cpu_it_writes_what_it_always_did(tiny: Path, tmp_path: Path, asked: list[tuple[str, str]]) -> None:
    found, said = text(tiny, tmp_path, "cpu")
    assert (asked, said) == ([("cpu", "float32")], [])
    assert len(found.token_ids) == 3


def test_a_gpu_without_room_is_left_for_the_cpu(tiny: Path, tmp_path: Path, asked: list[tuple[str, str]]) -> None:
    need = gpu_writing_bytes(open_checkpoint(tiny), LENGTH)
    with emulated_gpu(vram_bytes=need - 1):
        _, said = text(tiny, tmp_path, "cuda:0")
    assert asked == [("cpu", "float32")]
    assert said[0].startswith("the model writes its text on the CPU: it takes ")
    with emulated_gpu(vram_bytes=need):
        text(tiny, tmp_path, "cuda:0")
    assert asked[1:] == [("cuda:0", "auto")]


def test_out_of_memory_it_begins_again_on_the_cpu(
    tiny: Path, tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []

    def load(_folder: Path, device: str = "cpu", **_options: Any) -> Any:
        devices.append(device)
        if device != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return model

    monkeypatch.setattr(loading, "load_causal_lm", load)
    with emulated_gpu():
        _, said = text(tiny, tmp_path, "cuda")
    assert devices == ["cuda", "cpu"]
    assert "out of the GPU's memory" in said[-1]


def test_other_text_asks_for_no_gpu(tiny: Path, tmp_path: Path, asked: list[tuple[str, str]]) -> None:
    found, said = text(tiny, tmp_path, "cuda", "python-docs")  # there is none: a question would fail
    assert (asked, said, len(found.token_ids)) == ([], [], 3)


def test_a_build_hands_its_device_on(
    tiny: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []

    def read(_spec: object, _base: Path, _checkpoint: object, device: str, _reporter: object) -> CalibrationSet:
        devices.append(device)
        raise PlanError("this is as far as it goes")

    monkeypatch.setattr("quantize.calibration.writing.read_text", read)
    calibration = {"dataset": "self", "samples": 4, "sequence_length": 64}
    recipe = write_recipe(tmp_path / "demo.yaml", tiny, VARIANTS[:1], calibration=calibration)
    with pytest.raises(AssertionError, match="as far as it goes"):
        build_in_process(run, recipe, monkeypatch)
    assert devices == ["cuda"]
