"""The llama.cpp engine on a tiny GGUF file, in its own process, against llama-cpp-python's own high-level class."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from quantize.estimate.vram import EstimateSettings, kv_bytes
from quantize.files.gguf_split import read_model
from quantize.model.shape import gguf_shape
from quantize.runtimes.llama_cpp.model import ModelSettings, OpenModel
from quantize.runtimes.llama_cpp.placement import Placed
from quantize.runtimes.served import KV_BITS, Serving
from tests.serve.conftest import SERVED_CONTEXT, Running, gguf_gateway

llama_cpp = pytest.importorskip("llama_cpp")
PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def reference(weights: Path) -> Iterator[Any]:
    model = llama_cpp.Llama(
        str(weights), n_ctx=SERVED_CONTEXT, n_threads=1, flash_attn=False, verbose=False, logits_all=True
    )
    yield model
    model.close()


def complete(served: Running, prompt: str, **fields: Any) -> str:
    answer = served.ask("POST", "/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 24, **fields})
    assert answer.status == 200, answer.body
    return plain(answer.json["choices"][0]["text"])


def plain(text: str) -> str:
    """Without the bytes that are no text: llama-cpp-python leaves them out, we mark them."""
    return text.replace("\ufffd", "")


@pytest.mark.parametrize("prompt", [PROMPT, "a", "What is the capital of France? " * 6])
def test_greedy_text_is_llama_cpps_own(served: Running, reference: Any, prompt: str) -> None:
    wanted = reference.create_completion(prompt, temperature=0, max_tokens=24, repeat_penalty=1.0)["choices"][0]
    assert complete(served, prompt) == wanted["text"]


@pytest.mark.parametrize(("bits", "kind"), [("8", llama_cpp.GGML_TYPE_Q8_0), ("4", llama_cpp.GGML_TYPE_Q4_0)])
def test_a_quantized_kv_cache_answers_as_llama_cpps_own(weights: Path, bits: str, kind: int) -> None:
    model = llama_cpp.Llama(
        str(weights), n_ctx=SERVED_CONTEXT, n_threads=1, flash_attn=True, type_k=kind, type_v=kind, verbose=False
    )
    wanted = model.create_completion(PROMPT * 8, temperature=0, max_tokens=24, repeat_penalty=1.0)["choices"][0]
    model.close()
    with gguf_gateway(weights, Serving(SERVED_CONTEXT, slots=2, threads=1, kv_bits=bits)) as running:
        assert complete(running, PROMPT * 8) == plain(wanted["text"])


@pytest.mark.parametrize("kv_type", KV_BITS.values())
def test_the_kv_cache_is_as_large_as_estimated(weights: Path, kv_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Listening(Placed):
        def line(self, line: str) -> None:
            told.append(line)
            super().line(line)

    monkeypatch.setattr("quantize.runtimes.llama_cpp.model.Placed", Listening)
    settings = ModelSettings(SERVED_CONTEXT, threads=1, flash_attention=True, kv_type=kv_type)
    OpenModel(weights, settings).close()
    (found,) = [float(item[1]) for line in told if (item := re.search(r"KV buffer size = +([0-9.]+) MiB", line))]
    estimated = kv_bytes(gguf_shape(read_model(weights)), SERVED_CONTEXT, settings=EstimateSettings(kv_type=kv_type))
    assert found == pytest.approx(estimated / 2**20, abs=0.01)


def test_a_chat_uses_the_files_own_template(served: Running, reference: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which fox?"}]
    wanted = reference.create_chat_completion(messages, temperature=0, max_tokens=16, repeat_penalty=1.0)
    answer = served.ask("POST", "/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 16}).json
    text = plain(answer["choices"][0]["message"]["content"])
    assert len(text) > 5
    assert wanted["choices"][0]["message"]["content"].startswith(text)  # it goes on until its bytes are characters
    assert answer["usage"]["prompt_tokens"] == wanted["usage"]["prompt_tokens"]


def test_log_probabilities_are_llama_cpps_own(served: Running, reference: Any) -> None:
    fields = {"temperature": 0, "max_tokens": 4, "logprobs": 3}
    wanted = reference.create_completion(PROMPT, repeat_penalty=1.0, **fields)["choices"][0]["logprobs"]
    found = served.ask("POST", "/v1/completions", {"prompt": PROMPT, **fields}).json["choices"][0]["logprobs"]
    assert len(found["token_logprobs"]) == 4  # llama-cpp-python goes on, as above
    assert found["token_logprobs"] == pytest.approx(wanted["token_logprobs"][:4], abs=1e-3)
    for ours, theirs in zip(found["top_logprobs"], wanted["top_logprobs"], strict=False):
        assert max(ours.values()) == pytest.approx(max(theirs.values()), abs=1e-3)


def test_answers_side_by_side_are_those_that_come_alone(served: Running) -> None:
    from concurrent.futures import ThreadPoolExecutor

    prompts = [f"{word} {PROMPT}" for word in ("one", "two", "three", "four", "five", "six")]
    alone = [complete(served, prompt) for prompt in prompts]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda prompt: complete(served, prompt), prompts))
    assert together == alone


def test_the_same_seed_gives_the_same_text(served: Running) -> None:
    def sample(seed: int) -> str:
        return complete(served, PROMPT, temperature=1.0, seed=seed, top_k=50, top_p=0.95, min_p=0.01)

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_penalties_and_stops_change_the_text(served: Running) -> None:
    usual = complete(served, PROMPT)
    assert complete(served, PROMPT, repetition_penalty=1.8, frequency_penalty=1.5, presence_penalty=1.0) != usual
    assert complete(served, PROMPT, stop=[usual[-3:]]) == usual[: usual.index(usual[-3:])]


def test_output_fits_a_schema_or_a_grammar(served: Running) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "JSON"}], temperature=1, seed=3, max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    )  # fmt: skip
    assert isinstance(json.loads(answer.choices[0].message.content or "")["ok"], bool)
    assert complete(served, PROMPT, grammar='root ::= "yes" | "no"') in ("yes", "no")
    refused = served.ask("POST", "/v1/completions", {"prompt": "x", "grammar": "root ::= ("})
    assert (refused.status, refused.json["error"]["code"]) == (422, "invalid_grammar")
    assert complete(served, PROMPT)


def test_tokens_as_a_prompt_and_those_that_are_none(served: Running) -> None:
    assert served.ask("POST", "/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 2}).status == 200
    for token in (-1, 10**6, 2**40):
        answer = served.ask("POST", "/v1/completions", {"prompt": [token], "max_tokens": 2})
        assert (answer.status, answer.json["error"]["param"]) == (422, "prompt")


def test_the_context_is_the_limit(served: Running) -> None:
    long = served.ask("POST", "/v1/completions", {"prompt": "fox " * 2000})
    assert (long.status, long.json["error"]["code"]) == (413, "input_too_long")
    answer = served.ask("POST", "/v1/completions", {"prompt": [5] * (SERVED_CONTEXT - 6), "temperature": 0})
    assert answer.status == 200
    assert answer.json["usage"]["completion_tokens"] <= 6
    both = served.ask("POST", "/v1/completions", {"prompt": [5] * (SERVED_CONTEXT - 6), "max_tokens": 7})
    assert (both.status, both.json["error"]["code"]) == (422, "context_length_exceeded")


def test_a_conversation_that_goes_on_gives_what_a_fresh_one_gives(served: Running, reference: Any) -> None:
    """What a slot keeps of the turn before is used again; the text must be that of a model that starts afresh."""
    complete(served, PROMPT)
    longer = PROMPT + " jumps over the lazy dog"
    wanted = reference.create_completion(longer, temperature=0, max_tokens=12, repeat_penalty=1.0)["choices"][0]["text"]
    assert complete(served, longer, max_tokens=12) == wanted


def test_where_the_layers_are_is_told(served: Running) -> None:
    told = served.ask("GET", "/ready").json["models"]["tiny"]
    assert sum(told["devices"].values()) == 3  # two blocks and the output
    assert set(told["devices"]) == {"CPU"}
    assert told["warnings"] == []


def test_buffers_of_the_real_log(weights: Path) -> None:
    model = OpenModel(weights, ModelSettings(SERVED_CONTEXT, threads=1))
    try:
        found = model.placed.buffer_bytes
    finally:
        model.close()
    assert sum(found.values()) > 500_000
    assert all(name.startswith("CPU") for name in found)
    assert model.placed.gpu_bytes == 0


def test_a_gateway_that_is_killed_leaves_no_process_behind(weights: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "quantize", "serve", f"tiny={weights}", "--port", "0", "--device", "cpu"]
    gateway = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert gateway.stderr is not None
    told = gateway.stderr.readline()
    assert told.startswith("tiny: fits: at most ")
    pid = next(json.loads(line)["pid"] for line in gateway.stderr if '"engine_starting"' in line)
    next(line for line in gateway.stderr if '"engine_ready"' in line)
    gateway.kill()
    gateway.communicate()
    give_up = time.monotonic() + 5
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < give_up, "the model's process lives on"
        time.sleep(0.02)
