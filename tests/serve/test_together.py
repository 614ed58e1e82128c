"""Answers that go on in one forward pass on a GPU, an emulated one, are those that each has alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.runtimes.base import ModelRef
from quantize.runtimes.served import Chosen, PromptTokens, Sampling, Serving
from quantize.runtimes.transformers.kind import Transformers
from quantize.runtimes.transformers.load import LoadedModel, load_causal_lm
from quantize.runtimes.transformers.served import TransformersModel
from tests.emulated import Ledger, emulated_gpu, put_on_gpu

PROMPTS = ("def add(a, b):", "The", "One two three four five six seven eight nine ten")
TOKENS = 10


def opened(tiny: Path, device: str) -> TransformersModel:
    serving = Serving(context=128, slots=4, threads=1, device=device)
    return TransformersModel(Transformers(chooses_dtype=True), ModelRef(tiny, "safetensors"), serving, lambda _: None)


@pytest.fixture(scope="module")
def alone(tiny: Path) -> Iterator[list[list[int]]]:
    """Greedy answers to each of PROMPTS, one after the other, on the CPU."""
    model = opened(tiny, "cpu")
    answers = []
    for prompt in PROMPTS:
        slot = model.begin(read(model, prompt), Sampling(temperature=0))
        answers.append([chosen(model.step()[slot]) for _ in range(TOKENS)])
        model.end(slot)
    yield answers
    model.close()


def read(model: TransformersModel, prompt: str) -> PromptTokens:
    return model.read({"prompt": prompt}, threading.Event())


def chosen(found: Any) -> int:
    assert isinstance(found, Chosen)
    return found.token


@pytest.fixture
def on_gpu(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[TransformersModel, Ledger]]:
    loaded = load_causal_lm(tiny, dtype=torch.float32)
    loaded.set_attn_implementation("eager")
    monkeypatch.setattr(Transformers, "load", lambda *_: LoadedModel(put_on_gpu(loaded)))
    with emulated_gpu() as ledger:
        model = opened(tiny, "cuda:0")
        yield model, ledger
        model.close()
        del model


def test_answers_that_begin_and_end_at_other_times_are_those_of_each_alone(
    on_gpu: tuple[TransformersModel, Ledger], alone: list[list[int]]
) -> None:
    """The second begins when the first has three tokens, the third when it has five; each ends by itself."""
    model, _ = on_gpu
    begins, slots, found = (0, 3, 5), dict[int, int](), [[] for _ in PROMPTS]  # type: ignore[var-annotated]
    for step in range(TOKENS + max(begins)):
        for number, begin in enumerate(begins):
            if step == begin:
                slots[model.begin(read(model, PROMPTS[number]), Sampling(temperature=0))] = number
        for slot, token in model.step().items():
            answer = found[slots[slot]]
            answer.append(chosen(token))
            if len(answer) == TOKENS:
                model.end(slot)
                del slots[slot]
    assert found == alone
    assert not slots


def test_a_step_of_three_answers_launches_what_one_does(on_gpu: tuple[TransformersModel, Ledger]) -> None:
    model, ledger = on_gpu

    def launches() -> int:
        before = ledger.launches
        model.step()
        return ledger.launches - before

    slots = [model.begin(read(model, PROMPTS[0]), Sampling(temperature=0))]
    model.step()
    one = launches()
    slots += [model.begin(read(model, prompt), Sampling(temperature=0)) for prompt in PROMPTS[1:]]
    model.step()
    three = launches()
    assert three < 1.3 * one, "each answer has its own choice of a token, and nothing else"
    for slot in slots:
        model.end(slot)
