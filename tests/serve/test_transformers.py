"""The transformers engine on a tiny checkpoint: against transformers' own generate, and its sampler by its laws."""

from __future__ import annotations

import json
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from quantize.runtimes.base import ModelRef
from quantize.runtimes.choosing import _sample
from quantize.runtimes.intake import Intake
from quantize.runtimes.served import PromptTokens, Refused, Sampling, Serving
from quantize.runtimes.transformers.kind import Transformers
from quantize.runtimes.transformers.served import TransformersModel
from quantize.runtimes.transformers.words import DESK, StreamPieces, _desk_options
from tests.serve.test_tools import HERMES, WEATHER

torch = pytest.importorskip("torch")

PROMPT = "The quick brown fox jumps"


@pytest.fixture(scope="module")
def model(tiny: Path) -> Iterator[TransformersModel]:
    seen: list[float] = []
    serving = Serving(context=256, slots=2, threads=1)
    made = TransformersModel(Transformers(chooses_dtype=True), ModelRef(tiny, "safetensors"), serving, seen.append)
    assert seen
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    yield made
    made.close()


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


def read(model: TransformersModel, prompt: str) -> PromptTokens:
    return model.read({"prompt": prompt}, threading.Event())


def generate(model: TransformersModel, prompt: str, count: int, **sampling: Any) -> list[int]:
    slot = model.begin(read(model, prompt), Sampling(**sampling))
    tokens: list[int] = []
    while len(tokens) < count:
        chosen = model.step()
        if slot in chosen:
            tokens.append(chosen[slot].token)
    model.end(slot)
    return tokens


def reference(tiny: Path, prompt: str, count: int, **settings: Any) -> list[int]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(tiny)(prompt, return_tensors="pt")
    output = loaded.generate(
        **ids, do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=0, **settings
    )
    return [int(token) for token in output[0, ids["input_ids"].shape[1] :]]


def test_greedy_is_transformers_own(model: TransformersModel, tiny: Path) -> None:
    assert generate(model, PROMPT, 12, temperature=0) == reference(tiny, PROMPT, 12)


def test_the_repetition_penalty_is_transformers_own(model: TransformersModel, tiny: Path) -> None:
    penalized = generate(model, PROMPT, 12, temperature=0, repetition_penalty=1.5)
    assert penalized == reference(tiny, PROMPT, 12, repetition_penalty=1.5)
    assert penalized != generate(model, PROMPT, 12, temperature=0)


def test_a_vector_is_the_mean_of_the_last_layer(model: TransformersModel, tiny: Path, monkeypatch: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr("quantize.runtimes.transformers.served.PREFILL_TOKENS", 7)
    slot = model.begin_embedding(read(model, PROMPT).tokens)
    found: dict[int, Any] = {}
    while slot not in found:
        found.update(model.step())
    model.end(slot)
    loaded = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(tiny)(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        mean = loaded(**ids, output_hidden_states=True).hidden_states[-1][0].mean(0)
    wanted = (mean / mean.norm()).tolist()
    assert list(struct.unpack(f"<{len(wanted)}f", found[slot].values)) == pytest.approx(wanted, abs=1e-5)


def test_tools_reach_the_template_and_control_tokens_are_known(
    model: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = model._tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", HERMES)
    messages = [{"role": "user", "content": "rain?"}]
    intake = Intake(DESK, _desk_options(tokenizer))
    asked = ({}, {"tools": [WEATHER], "lead": "<tool_call>\n"})
    bare, told = (intake.read({"messages": messages, **more}, threading.Event()).tokens for more in asked)
    intake.close()
    text = tokenizer.decode(told)
    assert json.dumps(WEATHER) in text
    assert text.endswith("<|im_start|>assistant\n<tool_call>\n")
    assert len(told) > len(bare) + 50
    special = tokenizer.all_special_ids[0]
    assert model.token_of(tokenizer.convert_ids_to_tokens(special)) == special
    assert model.token_of("fox") is None
    assert model.token_of("<no such token>") is None


def test_a_prompt_in_parts_gives_what_it_gives_whole(model: TransformersModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate(model, PROMPT * 4, 6, temperature=0)
    monkeypatch.setattr("quantize.runtimes.transformers.served.PREFILL_TOKENS", 7)
    assert generate(model, PROMPT * 4, 6, temperature=0) == whole


def test_two_at_once_do_not_disturb_each_other(model: TransformersModel) -> None:
    alone = [generate(model, prompt, 6, temperature=0) for prompt in (PROMPT, "dog")]
    slots = [model.begin(read(model, prompt), Sampling(temperature=0)) for prompt in (PROMPT, "dog")]
    together: dict[int, list[int]] = {slot: [] for slot in slots}
    for _ in range(6):
        for slot, chosen in model.step().items():
            together[slot].append(chosen.token)
    for slot in slots:
        model.end(slot)
    assert [together[slot] for slot in slots] == alone


def test_seeds_and_log_probabilities(model: TransformersModel) -> None:
    assert generate(model, PROMPT, 8, seed=5) == generate(model, PROMPT, 8, seed=5)
    assert len({tuple(generate(model, PROMPT, 8, seed=seed)) for seed in range(4)}) > 1
    slot = model.begin(read(model, PROMPT), Sampling(temperature=0, logprobs=3))
    chosen = model.step()[slot]
    model.end(slot)
    assert chosen.logprob == chosen.top[0][1]
    assert [value for _, value in chosen.top] == sorted((value for _, value in chosen.top), reverse=True)
    assert chosen.top[0][0] == chosen.token


def test_text_streams_as_it_decodes(model: TransformersModel, tiny: Path) -> None:
    from transformers import AutoTokenizer

    pieces, tokens = model.detokenizer(), read(model, PROMPT + " é 漢").tokens
    assert "".join(pieces.add(token) for token in tokens) == AutoTokenizer.from_pretrained(tiny).decode(tokens)


@given(st.lists(st.integers(0, 383), max_size=60))
@example([1, 352, 56, 188, 212, 349, 90])  # bytes that are no text: tokenizers' decoder fails at 349
def test_whatever_tokens_come_there_is_text(tokenizer: Any, tokens: list[int]) -> None:
    """As the tokenizer decodes them all at once, where that is text: of other bytes it makes what it likes."""
    pieces = StreamPieces(tokenizer)
    streamed = "".join([pieces.add(token) for token in tokens] + [pieces.flush()])
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    if "\ufffd" not in whole:
        assert streamed == whole


def test_a_chat_uses_the_folders_template(model: TransformersModel, tiny: Path) -> None:
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "Which fox?"}]
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert model.read({"messages": messages}, threading.Event()).tokens == wanted


def test_tokens_that_are_none(model: TransformersModel) -> None:
    with pytest.raises(Refused, match="vocabulary"):
        model.begin(PromptTokens([10**6]), Sampling())


def by_a_full_sort(scores: Any, sampling: Sampling, generator: Any) -> int:
    """The same by its definition."""
    values, order = scores.sort(descending=True)
    values = values[: sampling.top_k] if sampling.top_k else values
    chances = torch.softmax(values, -1)
    kept = len(chances)
    if sampling.top_p < 1:
        kept = int((chances.cumsum(-1) - chances < sampling.top_p).sum())
    if sampling.min_p:
        kept = min(kept, max(1, int((chances >= sampling.min_p * chances[0]).sum())))
    picked = torch.multinomial(torch.softmax(values[:kept] / sampling.temperature, -1), 1, generator=generator)
    return int(order[picked])


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, top_p=0.9),
        Sampling(temperature=1.0, min_p=0.05),
        Sampling(temperature=1.0, min_p=0.9, top_p=0.5),
        Sampling(temperature=1.3, top_k=40, top_p=0.95),
        Sampling(temperature=1.0),
    ],
)
def test_not_sorting_the_whole_vocabulary_changes_no_token(sampling: Sampling, spread: float) -> None:
    for seed in range(20):
        scores = torch.randn(6000, generator=torch.Generator().manual_seed(seed)) * spread
        found = _sample(torch, scores, sampling, torch.Generator().manual_seed(seed))
        assert found == by_a_full_sort(scores, sampling, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(top_k=2), {0, 1}),
        (Sampling(top_p=0.5), {0}),
        (Sampling(top_p=0.7), {0, 1}),
        (Sampling(min_p=0.3), {0, 1}),
        (Sampling(temperature=0), {0}),
        (Sampling(), {0, 1, 2, 3}),
    ],
)
def test_the_sampler_keeps_to_what_it_was_told(sampling: Sampling, possible: set[int]) -> None:
    scores = torch.log(torch.tensor([0.5, 0.3, 0.13, 0.07]))
    generator = torch.Generator().manual_seed(0)
    seen = Counter(_sample(torch, scores, sampling, generator) for _ in range(400))
    assert set(seen) == possible
    if possible == {0, 1, 2, 3}:
        assert 150 < seen[0] < 250
