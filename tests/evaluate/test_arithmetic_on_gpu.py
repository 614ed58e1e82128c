"""What is made of logits is made where they are: of those on a GPU, an emulated one, only what is chosen is copied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantize.evaluate.baseline import LIKELIEST, record
from quantize.evaluate.measure import measure
from quantize.events import SilentReporter
from quantize.runtimes.base import ModelRef, Prompted, log_softmax
from quantize.runtimes.choosing import Answer, _penalized, _sample
from quantize.runtimes.served import Sampling
from quantize.runtimes.transformers.load import LoadedModel
from quantize.runtimes.transformers.runtime import TransformersRuntime
from tests.architectures import tiny_model
from tests.emulated import emulated_gpu, put_on_gpu
from tests.evaluate.test_metrics import TableRuntime, windows_of

QUIET = SilentReporter()
VOCABULARY = 20_000
WINDOWS = windows_of([0, 3, 1, 2, 5, 4, 7], [6, 6, 1, 0, 2, 3, 5])


class OnGpu(TableRuntime):
    """A table of logits that is on the GPU."""

    def log_probs(self, window: Sequence[int]) -> Iterator[Any]:
        yield log_softmax(torch.as_tensor(self.table[list(window[:-1])]).to("cuda"), "table")


class Loader:
    """Loads a tiny model onto the emulated GPU."""

    name = "transformers"

    def import_torch(self, feature: str) -> Any:
        return torch

    def load(self, model: ModelRef, device: str) -> LoadedModel:
        return LoadedModel(put_on_gpu(llama()))


def llama() -> Any:
    model = tiny_model("LlamaForCausalLM")
    model.set_attn_implementation("eager")
    return model.eval()


def logits(seed: int) -> Any:
    """Of eight tokens, with ties."""
    return np.random.default_rng(seed).standard_normal((8, VOCABULARY)).round(3) * 3


def test_figures_are_the_cpus_and_whole_rows_stay_on_the_gpu() -> None:
    expected = record(TableRuntime(logits(0)), WINDOWS, QUIET)
    wanted = measure(TableRuntime(logits(1)), WINDOWS, expected, QUIET)
    with emulated_gpu() as ledger:
        baseline = record(OnGpu(logits(0)), WINDOWS, QUIET)
        quality = measure(OnGpu(logits(1)), WINDOWS, baseline, QUIET)
    assert np.array_equal(baseline.tokens, expected.tokens)
    assert quality.mean_kl == pytest.approx(wanted.mean_kl, rel=1e-6)
    assert quality.top_token_agreement == wanted.top_token_agreement
    rows, kept = len(baseline.tokens), LIKELIEST * 4
    assert rows == 12
    assert ledger.to_host < 1.01 * rows * 3 * kept, "token ids and two times their log-probabilities, of 80,000 bytes"


def test_of_equal_tokens_the_first_comes_first_on_either_side_of_the_cut() -> None:
    """Three values alone: nearly all that is kept is tied."""
    table = np.repeat([[2.0, 1.0, 0.0]], 8, axis=0)[:, np.arange(VOCABULARY) % 3]
    tokens = record(TableRuntime(table), WINDOWS, QUIET, keep=64).tokens
    assert all(np.array_equal(row, np.sort(row)) for row in tokens)
    assert (tokens % 3 == 0).all()


def test_a_model_in_transformers_gives_its_rows_where_it_is() -> None:
    window = [5, 9, 1, 30, 2, 7]
    with torch.inference_mode():
        expected = torch.log_softmax(llama()(torch.tensor([window[:-1]])).logits[0].double(), -1)
    with emulated_gpu() as ledger:
        runtime = TransformersRuntime(Loader(), ModelRef(Path("x"), "safetensors"), "1", device="cuda")  # type: ignore[arg-type]
        (block,) = runtime.log_probs(window)
        assert block.is_cuda
        assert ledger.to_host == 0
        torch.testing.assert_close(block.cpu().double(), expected, rtol=1e-4, atol=1e-4)
        (answer,) = runtime.answer([Prompted(tuple(window), 4)])
        runtime.close()
        del block
    assert len(answer) == 4


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0),
        Sampling(temperature=0.7, top_p=0.9),
        Sampling(temperature=1.0, top_k=40, min_p=0.02),
        Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.5, presence_penalty=0.25),
    ],
)
def test_a_token_is_drawn_without_copying_the_vocabulary(sampling: Sampling) -> None:
    """The default of /v1/generate among them: temperature 0.7, top_p 0.9."""
    scores = torch.randn(152_000, generator=torch.Generator().manual_seed(1)) * 8
    item = Answer([4, 4, 9, int(scores.argmax())], sampling, None)
    item.counts.update(item.tokens[1:])

    def drawn(scores: Any) -> int:
        generator = torch.Generator().manual_seed(3)
        return _sample(torch, _penalized(torch, scores, item), sampling, generator)

    expected = drawn(scores)
    with emulated_gpu() as ledger:
        assert drawn(scores.to("cuda")) == expected
        assert ledger.to_host < 20_000, "of 608,000 bytes"
