"""Which device a model is measured on, with GPUs that are only told of: what does not fit goes to the CPU, said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantize.errors import UsageError
from quantize.estimate.fit import FitWord, Workload, judge
from quantize.estimate.placing import layers_that_fit, place_on_gpu
from quantize.estimate.vram import IN_LLAMA_CPP, EstimateSettings
from quantize.evaluate.device import ModelRun, find_place
from quantize.evaluate.job import EvaluationJob
from quantize.evaluate.kinds import text_parts
from quantize.evaluate.session import evaluate
from quantize.formats import runtime_kind
from quantize.recipe.evaluation import Extent
from quantize.runtimes.base import ModelRef
from quantize.runtimes.devices import ON_CPU, Accelerator, DevicePlace, check_name, choose
from quantize.runtimes.llama_cpp.kind import LlamaCpp
from quantize.runtimes.transformers.kind import Transformers
from quantize.system.sizes import GIB
from tests.conftest import Built, ListReporter
from tests.test_hardware import LLAMA_8B

EIGHT_GB = Accelerator("cuda:0", "RTX 4060", 8 * GIB, 7 * GIB)
BUSY = Accelerator("cuda:0", "RTX 4060", 8 * GIB, GIB // 8)
OTHER = Accelerator("cuda:1", "RTX 4060", 8 * GIB, 7 * GIB)
Q4_8B = Workload(LLAMA_8B, 5 * GIB, IN_LLAMA_CPP, EstimateSettings(flash_attention=False), 4096, 1)
F16_8B = dataclasses.replace(Q4_8B, weights_bytes=15 * GIB)
ON_GPU = dataclasses.replace(EIGHT_GB, free_bytes=7 * GIB)
PYTHON_DOCS = text_parts("python-docs", Path())


@pytest.fixture
def job(built: Built, tiny: Path, tmp_path: Path) -> EvaluationJob:
    (path,) = (built.store.root / "tiny" / "f16" / "current").glob("*.gguf")
    return EvaluationJob(
        source=ModelRef(tiny, "safetensors"), source_digest="a" * 64, artifact=ModelRef(path.parent, "gguf", path.name),
        cache=tmp_path / "cache", text=PYTHON_DOCS, text_name="python-docs", extent=Extent(64, 1, 0, 0),
    )  # fmt: skip


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have transformers, and llama.cpp where it is told, see these GPUs."""

    def have(*gpus: Accelerator, llama_cpp: tuple[Accelerator, ...] = ()) -> None:
        monkeypatch.setattr(Transformers, "find_gpus", lambda _: gpus)
        monkeypatch.setattr(LlamaCpp, "find_gpus", lambda _: llama_cpp)

    return have


def warnings(reporter: ListReporter) -> list[str]:
    return [event.text for event in reporter.events if event.kind == "warning"]


def test_a_source_that_does_not_fit_the_card_is_read_on_the_cpu(job: EvaluationJob, cards: Callable[..., None]) -> None:
    reporter = ListReporter()
    cards(BUSY)
    evaluate(reporter, dataclasses.replace(job, device="auto"))
    (said,) = warnings(reporter)
    assert said.startswith("the safetensors model is run on the CPU: it takes ")
    assert said.endswith("are free on cuda:0 (RTX 4060)")


def test_a_card_that_runs_out_of_memory_is_one_retry_on_the_cpu(
    job: EvaluationJob, cards: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    asked: list[str] = []
    load = Transformers.load

    def loaded(self: Transformers, model: ModelRef, device: str) -> Any:
        asked.append(device)
        if device != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return load(self, model, device)

    monkeypatch.setattr(Transformers, "load", loaded)
    cards(EIGHT_GB)
    reporter = ListReporter()
    found = evaluate(reporter, dataclasses.replace(job, device="cuda"))
    assert asked == ["cuda:0", "cpu"]
    assert found.quality.mean_kl < 0.001
    source, artifact = warnings(reporter)
    assert "run on the CPU: cuda:0 is out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.)" in source
    assert "the gguf model is run on the CPU: llama.cpp has no cuda here (GPUs: none)" in artifact


def test_the_cpu_is_asked_for_by_name_and_no_card_is_looked_at(
    job: EvaluationJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Transformers, "find_gpus", lambda _: pytest.fail("looked"))
    assert find_place(ListReporter(), ModelRun(job.source, "cpu", 64)) == ON_CPU


def test_a_baseline_of_a_gpu_is_another_one(
    job: EvaluationJob, cards: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Transformers.open
    on_cpu: dict[str, Any] = {"place": ON_CPU}
    monkeypatch.setattr(Transformers, "open", lambda self, model, **how: opened(self, model, **{**how, **on_cpu}))
    cards(EIGHT_GB)
    for device in ("cpu", "cuda:0", "cpu"):
        evaluate(ListReporter(), dataclasses.replace(job, device=device))
    assert len(list(job.cache.glob("baselines/[0-9a-f]*"))) == 2


def test_layers_that_fit_go_to_the_card_and_are_said(built: Built, cards: Callable[..., None]) -> None:
    placing = place_on_gpu(F16_8B, [EIGHT_GB], EIGHT_GB, splits=True)
    assert placing is not None
    layers = placing.place.gpu_layers
    assert placing.place == DevicePlace("cuda:0", layers)
    assert layers == layers_that_fit(F16_8B, EIGHT_GB.free_bytes)
    assert layers is not None
    assert 5 < layers < 20
    assert f"{layers} of 32 layers on cuda:0 (RTX 4060), the others on the CPU" in placing.note
    more = dataclasses.replace(F16_8B, gpu_layers=layers + 1)
    assert judge(more.estimate(), EIGHT_GB.free_bytes).word is not FitWord.FITS
    assert place_on_gpu(F16_8B, [EIGHT_GB], EIGHT_GB, splits=False) is None
    assert layers_that_fit(F16_8B, BUSY.free_bytes) == 0


def test_several_cards_share_what_is_too_large_for_one() -> None:
    half = dataclasses.replace(OTHER, free_bytes=EIGHT_GB.free_bytes // 2)
    large = dataclasses.replace(Q4_8B, weights_bytes=6 * GIB)
    placing = place_on_gpu(large, [EIGHT_GB, half], EIGHT_GB, splits=True)
    assert placing is not None
    assert placing.place == DevicePlace("cuda", None, (0.6667, 0.3333))
    assert placing.note == "too large for one GPU: 67% on cuda:0, 33% on cuda:1"
    vulkan = dataclasses.replace(half, device="vulkan:0")
    alone = place_on_gpu(large, [EIGHT_GB, vulkan], EIGHT_GB, splits=True)
    assert alone is not None, "a card that two libraries see is not two cards"
    assert alone.place.shares == ()


def test_the_layers_that_are_asked_for_are_what_is_estimated() -> None:
    ten = dataclasses.replace(F16_8B, gpu_layers=10)
    assert ten.estimate().weights_bytes == pytest.approx(F16_8B.weights_bytes * 10 / 32, abs=32)
    assert dataclasses.replace(F16_8B, gpu_layers=99).estimate() == F16_8B.estimate()
    assert place_on_gpu(F16_8B, [EIGHT_GB], EIGHT_GB, splits=False) is None
    placing = place_on_gpu(ten, [EIGHT_GB], EIGHT_GB, splits=True)
    assert placing is not None
    assert placing.place == DevicePlace("cuda:0", 10)


def test_names_of_devices() -> None:
    assert [check_name(word) for word in ("auto", "gpu", "cuda", "vulkan:1", "metal")] == [
        "auto", "gpu", "cuda:0", "vulkan:1", "metal:0",
    ]  # fmt: skip
    for word in ("tpu", "cuda:x", "cuda:", "CUDA0"):
        with pytest.raises(UsageError, match=f"{word!r} is no device"):
            check_name(word)
    assert choose("auto", []) is None
    assert choose("auto", [BUSY, OTHER]) == OTHER
    assert choose("cuda:0", [BUSY, OTHER]) == BUSY
    with pytest.raises(LookupError):
        choose("gpu", [])


def test_every_runtime_says_what_it_computes_in() -> None:
    source = runtime_kind("safetensors")
    assert source.computes_in(ON_CPU) == "float32"
    assert source.computes_in(DevicePlace("cuda:0")) == "auto"
