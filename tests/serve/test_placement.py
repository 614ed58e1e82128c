"""Where each layer is: every one is counted, and one that is not where it was asked to be is told, or refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantize.runtimes.base import ModelRef
from quantize.runtimes.devices import DevicePlace
from quantize.runtimes.llama_cpp import served as llama_served
from quantize.runtimes.llama_cpp.kind import LLAMA_CPP
from quantize.runtimes.llama_cpp.model import ModelSettings, OpenModel
from quantize.runtimes.llama_cpp.placement import Placed
from quantize.runtimes.served import Refused, Serving
from quantize.runtimes.transformers import served
from quantize.serve.engines.base import EngineTarget
from quantize.serve.engines.local import LocalEngine
from quantize.serve.preflight import engine_target
from quantize.serve.router import Rules
from tests.serve.conftest import Start
from tests.serve.rewritten import rewritten

pytest.importorskip("llama_cpp")


@pytest.mark.parametrize("blocks", [32, 48, 64, 80])
def test_every_layer_is_counted_however_many(weights: Path, tmp_path: Path, blocks: int) -> None:
    model = OpenModel(rewritten(weights, tmp_path / "deep.gguf", blocks=blocks), ModelSettings(64, threads=1))
    try:
        assert model.placed.layers == {"CPU": blocks + 1}  # and the output
        assert model.placed.astray("cpu", None) == ""
    finally:
        model.close()


def placed(*devices: str) -> Placed:
    found = Placed()
    for layer, device in enumerate(devices):
        found.line(f"load_tensors: layer {layer:3d} assigned to device {device}, is_swa = 0")
    return found


@pytest.mark.parametrize(
    ("devices", "wanted", "gpu_layers", "astray"),
    [
        (["CUDA0"] * 3, "cuda:0", None, ""),
        (["CPU", "CUDA0", "CUDA0"], "cuda:0", None, "of 3 layers, 1 on CPU instead of cuda:0"),
        (["CPU", "CUDA0", "CUDA0"], "cuda:0", 2, ""),
        (["CPU", "CPU", "CUDA0"], "cuda:0", 2, "of 3 layers, 1 on CPU instead of cuda:0"),
        (["CUDA0"] * 3, "cuda:0", 99, ""),
        (["CUDA0", "CUDA1"], "cuda:1", None, "of 2 layers, 1 on CUDA0 instead of cuda:1"),
        (["CUDA0", "CPU"], "cpu", None, "of 2 layers, 1 on CUDA0 instead of cpu"),
        (["Metal", "Metal"], "metal:0", None, ""),
        (["Vulkan0"], "cuda:0", None, "of 1 layers, 1 on Vulkan0 instead of cuda:0"),
        (["CUDA0", "CUDA1"], "cuda", None, ""),
        ([], "cpu", None, "llama.cpp does not say where the layers are"),
    ],
)
def test_what_is_not_where_it_was_asked_to_be(
    devices: list[str], wanted: str, gpu_layers: int | None, astray: str
) -> None:
    assert placed(*devices).astray(wanted, gpu_layers) == astray


def test_a_layer_that_has_moved_is_counted_once() -> None:
    found = placed("CUDA0", "CUDA0")
    found.line("load_tensors: layer   1 assigned to device CPU, is_swa = 0")
    assert found.layers == {"CUDA0": 1, "CPU": 1}


def engine(weights: Path, *, named: bool) -> Any:
    serving = Serving(64, 1, "cuda:0", threads=1, named=named)
    target = EngineTarget("tiny", LLAMA_CPP, ModelRef(weights.parent, "gguf", weights.name), serving)
    return lambda watcher: {"tiny": LocalEngine(target, watcher.about("tiny"))}


def test_a_device_that_was_named_and_is_not_there_is_not_ready(weights: Path, start: Start) -> None:
    """This llama.cpp has no GPU to put a layer on, and would load all the same, on the CPU."""
    gateway = start(engine(weights, named=True), rules=Rules("tiny"), ready=False)
    gateway.wait(lambda: gateway.ask("GET", "/ready").json["models"]["tiny"]["state"] == "failed", 60)
    reason = gateway.ask("GET", "/ready").json["reason"]
    assert "this llama.cpp has no cuda:0 (GPUs: none, by its build or its driver)" in reason


def test_a_device_that_was_taken_because_it_is_there_is_a_warning(weights: Path, start: Start) -> None:
    gateway = start(engine(weights, named=False), rules=Rules("tiny"), ready=False)
    gateway.wait(gateway.is_ready, 60)
    told = gateway.ask("GET", "/ready").json["models"]["tiny"]
    assert told["devices"] == {"CPU": 3}
    assert told["warnings"][0].startswith("of 3 layers, 3 on CPU instead of cuda:0")
    assert any(line["event"] == "engine_warning" for line in gateway.lines())


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda:0"])
def test_a_device_is_named_unless_it_is_auto(weights: Path, device: str) -> None:
    target: Any = SimpleNamespace(name="tiny", kind=LLAMA_CPP, path=weights, format="gguf")
    placement: Any = SimpleNamespace(context=64, where=DevicePlace("cuda:0"))
    assert engine_target(target, Serving(device=device), placement).serving.named is (device != "auto")


@pytest.mark.parametrize(
    ("device", "kv_bits", "prefill", "flash_attention"),
    [("cuda:0", "16", 512, None), ("vulkan:0", "16", 512, None), ("cuda:0", "8", 512, True), ("cpu", "16", 256, False)],
)
def test_a_gpu_reads_whole_micro_batches_and_may_choose_flash_attention(
    device: str, kv_bits: str, prefill: int, flash_attention: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ModelSettings] = []

    def opened(_path: Path, settings: ModelSettings, **_: object) -> None:
        seen.append(settings)
        raise Refused(503, "seen", "that is all")

    monkeypatch.setattr(llama_served, "OpenModel", opened)
    monkeypatch.setattr(llama_served, "Intake", lambda *_: None)
    serving = Serving(4096, 2, device, named=True, kv_bits=kv_bits)
    with pytest.raises(Refused):
        LLAMA_CPP.serve(ModelRef(Path(), "gguf", "x.gguf"), serving, lambda _: None)
    assert (seen[0].batch(0), seen[0].flash_attention) == (prefill, flash_attention)


def test_transformers_layers_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = served.TransformersModel.__new__(served.TransformersModel)
    model._device, model._model, model._tokenizer = "cuda:0", None, SimpleNamespace(chat_template=None)
    model._tokenizer.get_chat_template = lambda: "{{ messages }}"
    model._intake = SimpleNamespace(warning=lambda: "")
    model._warnings = ()
    monkeypatch.setattr(served, "_devices", lambda _: {"cuda:0": 30, "cpu": 2})
    monkeypatch.setattr(served, "kernels", lambda _: "")
    assert model._describe("transformers", Serving(64, 1)).warnings == ["of 32 layers, 2 on cpu instead of cuda:0"]
    with pytest.raises(Refused, match="of 32 layers, 2 on cpu instead of cuda:0; --device auto"):
        model._describe("transformers", Serving(64, 1, named=True))
