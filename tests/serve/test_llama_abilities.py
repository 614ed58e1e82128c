"""What the llama.cpp engine does beside writing, on a tiny GGUF file whose chat template knows tools."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests.serve.conftest import SERVED_CONTEXT, Running
from tests.serve.rewritten import rewritten
from tests.serve.test_tools import HERMES, WEATHER

llama_cpp = pytest.importorskip("llama_cpp")
TEXTS = ["The quick brown fox", "jumps", "over the lazy dog and " * 20]  # the last takes several steps


@pytest.fixture(scope="module")
def weights(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose chat template knows tools."""
    return rewritten(weights, tmp_path_factory.mktemp("tools") / "tools.gguf", template=HERMES)


@pytest.fixture(scope="module")
def client(served: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def vectors(client: openai.OpenAI, texts: list[str]) -> Any:
    return np.array([item.embedding for item in client.embeddings.create(model="tiny", input=texts).data])


def test_vectors_are_llama_cpps_own_mean(client: openai.OpenAI, weights: Path) -> None:
    mean = llama_cpp.LLAMA_POOLING_TYPE_MEAN
    judge = llama_cpp.Llama(
        str(weights),
        n_ctx=SERVED_CONTEXT,
        n_threads=1,
        flash_attn=False,
        verbose=False,
        embedding=True,
        pooling_type=mean,
    )
    wanted = np.array([judge.embed(text, normalize=True) for text in TEXTS])
    judge.close()
    found = vectors(client, TEXTS)
    assert found.shape == wanted.shape
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-6)
    assert (found * wanted).sum(1) == pytest.approx(1, abs=1e-5)
    assert (found[0] @ found[1]) < 0.999  # and not all the same


def test_vectors_beside_answers_change_neither(client: openai.OpenAI, served: Running) -> None:
    def write(text: str) -> Any:
        body = {"prompt": text, "temperature": 0, "max_tokens": 40}
        return served.ask("POST", "/v1/completions", body).json["choices"][0]["text"]

    alone = [write(text) for text in TEXTS], vectors(client, TEXTS)
    with ThreadPoolExecutor(6) as pool:
        written = [pool.submit(write, text) for text in TEXTS]
        read = [pool.submit(vectors, client, [text]) for text in TEXTS]
        assert [item.result() for item in written] == alone[0]
        assert np.concatenate([item.result() for item in read]) == pytest.approx(alone[1], abs=1e-5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_be_is_one_whatever_the_model_would_write(client: openai.OpenAI, stream: bool) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Hanoi", "Hue"]}}, "required": ["city"],
              "additionalProperties": False}  # fmt: skip
    tool = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": schema}}
    fields: Any = {"model": "tiny", "messages": [{"role": "user", "content": "rain?"}], "tools": [tool],
                   "tool_choice": "required", "temperature": 1.0, "max_tokens": 100}  # fmt: skip
    if stream:
        with client.chat.completions.stream(**fields) as events:
            choice: Any = events.get_final_completion().choices[0]
    else:
        choice = client.chat.completions.create(**fields).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Hanoi", "Hue")


def test_tools_are_in_the_prompt(served: Running) -> None:
    plain = served.chat("rain?", max_tokens=1).json["usage"]["prompt_tokens"]
    with_tools = served.chat("rain?", max_tokens=1, tools=[WEATHER]).json["usage"]["prompt_tokens"]
    assert with_tools > plain + 50
