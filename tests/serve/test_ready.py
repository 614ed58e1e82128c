"""Ready means: a prompt as real ones are was answered, through the kernels that whole batches take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantize.runtimes.base import ModelRef
from quantize.runtimes.llama_cpp.kind import LLAMA_CPP
from quantize.runtimes.llama_cpp.model import OpenModel
from quantize.runtimes.served import ServedModel, Serving
from quantize.runtimes.transformers.kind import Transformers
from quantize.serve.engines.child import PROBE_TOKENS, _answer_once
from tests.conftest import Built

LARGEST_SMALL_BATCH = 50  # of ExLlama's kernels, which take another way above; llama.cpp's do at 32, CUDA's at 8
Make = Callable[[], tuple[ServedModel, list[int]]]


@pytest.fixture
def llama(built: Built, monkeypatch: pytest.MonkeyPatch) -> tuple[ServedModel, list[int]]:
    """A model, and how many tokens each of its batches has."""
    pytest.importorskip("llama_cpp")
    (path,) = built.store.root.glob("*/q8_0/current/*.gguf")
    model = LLAMA_CPP.serve(ModelRef(path.parent, "gguf", path.name), Serving(128, 2, threads=1), lambda _: None)
    batches: list[int] = []
    decode = OpenModel.decode
    monkeypatch.setattr(OpenModel, "decode", lambda self, rows: (batches.append(len(rows)), decode(self, rows)))
    return model, batches


@pytest.fixture
def torch(tiny: Path) -> tuple[ServedModel, list[int]]:
    """The same in transformers."""
    pytest.importorskip("torch")
    kind = Transformers(chooses_dtype=True)
    model: Any = kind.serve(ModelRef(tiny, "safetensors"), Serving(128, 2, threads=1), lambda _: None)
    batches: list[int] = []
    forward = model._model.forward
    model._model.forward = lambda **given: (batches.append(given["input_ids"].shape[1]), forward(**given))[1]
    return model, batches


@pytest.mark.parametrize("runtime", ["llama", "torch"])
def test_the_probe_is_one_whole_batch(runtime: str, request: pytest.FixtureRequest) -> None:
    model, batches = request.getfixturevalue(runtime)
    try:
        _answer_once(model)
    finally:
        model.close()
    assert batches == [PROBE_TOKENS]
    assert PROBE_TOKENS > LARGEST_SMALL_BATCH
