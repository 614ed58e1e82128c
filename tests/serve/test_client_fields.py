"""Every field that OpenAI's own types have: taken at the value that asks for nothing, else done, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_type_hints

import openai
import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionMessage,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import (
    completion_create_params as chat_params,
)

from tests.serve.conftest import Running, fakes, gateways

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
NEEDED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "one two"}], "model": "fake"},
    COMPLETIONS: {"prompt": "one two", "model": "fake"},
    EMBEDDINGS: {"input": "one two", "model": "fake"},
}
TYPES = {
    CHAT: chat_params.CompletionCreateParamsNonStreaming,
    COMPLETIONS: completion_create_params.CompletionCreateParamsNonStreaming,
    EMBEDDINGS: embedding_create_params.EmbeddingCreateParams,
}
# Field: values that are taken and leave the answer as it is, and values that are refused. None is taken everywhere.
VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    "audio": ([], [{"voice": "ash", "format": "mp3"}]),
    "best_of": ([1], [2]),
    "dimensions": ([2], [1]),
    "echo": ([False], [True]),
    "encoding_format": (["float"], []),
    "frequency_penalty": ([0, 0.0], [1.0]),
    "function_call": (["none", "auto"], [{"name": "f"}]),
    "functions": ([[]], [[{"name": "f"}]]),
    "logit_bias": ([{}], [{"5": 10}]),
    "logprobs": ([], []),
    "max_completion_tokens": ([9], []),
    "max_tokens": ([9], []),
    "metadata": ([{}, {"a": "b"}], []),
    "modalities": ([["text"]], [["text", "audio"]]),
    "moderation": ([], [{"model": "m"}]),
    "n": ([1], [2]),
    "parallel_tool_calls": ([True, False], []),
    "prediction": ([{"type": "content", "content": "x"}], []),
    "presence_penalty": ([0], [1.0]),
    "prompt_cache_key": (["k"], []),
    "prompt_cache_options": ([{}], []),
    "prompt_cache_retention": (["24h"], []),
    "reasoning_effort": ([], ["low"]),
    "response_format": ([{"type": "text"}], [{"type": "json_object"}]),
    "safety_identifier": (["who"], []),
    "seed": ([0], []),
    "service_tier": (["auto", "default"], ["priority"]),
    "stop": (["", [], ["zzz"]], []),
    "store": ([False], [True]),
    "stream": ([False], []),
    "stream_options": ([{"include_usage": False}, {"include_obfuscation": False}], [{"include_obfuscation": True}]),
    "suffix": ([""], ["x"]),
    "temperature": ([0, 1], []),
    "tool_choice": (["none", "auto"], ["required", {"type": "function", "function": {"name": "f"}}]),
    "tools": ([[]], [[{"type": "function", "function": {"name": "f"}}]]),
    "top_logprobs": ([0], []),
    "top_p": ([1, 0.5], []),
    "user": (["me"], []),
    "verbosity": (["medium"], ["low"]),
    "web_search_options": ([], [{}]),
}  # fmt: skip
MESSAGE_VALUES: dict[str, list[Any]] = {
    "audio": [None],
    "annotations": [None, []],
    "content": ["one"],
    "function_call": [None],
    "name": [None, "bob"],
    "refusal": [None, ""],
    "role": ["assistant"],
    "tool_calls": [None, []],
}


def fields_of(path: str) -> list[str]:
    return sorted(name for name in get_type_hints(TYPES[path]) if name not in NEEDED[path])


@pytest.fixture(scope="module")
def plain() -> Iterator[Running]:
    """A model that can do nothing but write, and make vectors."""
    with gateways() as run:
        yield run(fakes(supports=["embeddings"]))


@pytest.mark.parametrize(("path", "field"), [(path, field) for path in TYPES for field in fields_of(path)])
def test_a_field_at_its_default_changes_nothing_and_what_it_asks_for_is_refused_by_name(
    plain: Running, path: str, field: str
) -> None:
    usual = plain.ask("POST", path, NEEDED[path])
    taken, refused = VALUES[field]
    for value in [None, *taken]:
        answer = plain.ask("POST", path, {**NEEDED[path], field: value})
        assert answer.status == 200, (field, value, answer.body)
        assert answer.json.get("choices") == usual.json.get("choices")
        assert answer.json.get("data") == usual.json.get("data")
    for value in refused:
        answer = plain.ask("POST", path, {**NEEDED[path], field: value})
        assert (answer.status, answer.json["error"]["param"]) == (422, field), (field, value, answer.body)
        assert answer.json["error"]["code"] in ("unsupported_parameter", "invalid_value")


def test_a_number_is_no_bool_and_an_unknown_field_is_no_default(plain: Running) -> None:
    for field, value in (("best_of", True), ("echo", 0), ("store", 0), ("thinking", {}), ("web", [])):
        answer = plain.ask("POST", COMPLETIONS, {**NEEDED[COMPLETIONS], field: value})
        assert (answer.status, answer.json["error"]["param"]) == (422, field)


def test_every_field_of_a_message_at_its_default(plain: Running) -> None:
    hints = {**get_type_hints(ChatCompletionAssistantMessageParam), **get_type_hints(ChatCompletionUserMessageParam)}
    for field in {*hints, *ChatCompletionMessage.model_fields}:
        for value in MESSAGE_VALUES[field]:
            message = {"role": "assistant", "content": "one", field: value}
            answer = plain.ask("POST", CHAT, {"messages": [message]})
            assert answer.json["choices"][0]["message"]["content"] == "one ", (field, value, answer.body)
    assert set(get_type_hints(ChatCompletionToolMessageParam)) == {"content", "role", "tool_call_id"}
    for field, value in (("audio", {"id": "a"}), ("function_call", {"name": "f", "arguments": "{}"}), ("odd", 1)):
        answer = plain.ask("POST", CHAT, {"messages": [{"role": "assistant", "content": "one", field: value}]})
        assert (answer.status, answer.json["error"]["param"]) == (422, "messages")
        assert field in answer.json["error"]["message"]


def test_what_a_client_notes_of_other_providers_is_taken(plain: Running) -> None:
    message = {"role": "assistant", "content": "one", "provider_specific_fields": {"refusal": None}}
    assert plain.ask("POST", CHAT, {"messages": [message]}).status == 200


def test_an_answer_goes_back_as_the_client_dumps_it(plain: Running) -> None:
    client = openai.OpenAI(base_url=f"{plain.url}/v1", api_key="none", max_retries=0)
    first = client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "one"}])
    said: Any = first.choices[0].message.model_dump()
    again = client.chat.completions.create(model="fake", messages=[said, {"role": "user", "content": "two"}])
    assert again.choices[0].message.content == "one two "


def test_a_refusal_is_what_the_assistant_said(plain: Running) -> None:
    parts = [{"role": "assistant", "content": None, "refusal": "never"},
             {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}]  # fmt: skip
    assert plain.ask("POST", CHAT, {"messages": parts}).json["choices"][0]["message"]["content"] == "never no "


def test_embeddings(plain: Running) -> None:
    client = openai.OpenAI(base_url=f"{plain.url}/v1", api_key="none", max_retries=0)
    numbers = client.embeddings.create(model="fake", input=["a bb", "one two three"], encoding_format="float")
    assert [item.index for item in numbers.data] == [0, 1]
    assert numbers.data[0].embedding == pytest.approx([2 / 13**0.5, 3 / 13**0.5])
    assert (numbers.usage.prompt_tokens, numbers.usage.total_tokens, numbers.model) == (5, 5, "fake")
    packed = client.embeddings.create(model="fake", input="a bb")  # the client asks for base64 by itself
    assert packed.data[0].embedding == pytest.approx(numbers.data[0].embedding)
    assert b'quantize_tokens_in_total{model="fake"}' in plain.ask("GET", "/metrics").body


@pytest.mark.parametrize("given", ["", [], [""], ["a", ""], [[]], [99999]])
def test_what_is_no_text_to_embed(plain: Running, given: Any) -> None:
    answer = plain.ask("POST", EMBEDDINGS, {"input": given})
    assert answer.status == 422
    assert answer.json["error"]["code"] in ("invalid_value", "empty_prompt")


def test_a_model_without_embeddings_says_so(gateway: Running) -> None:
    answer = gateway.ask("POST", EMBEDDINGS, {"input": "a"})
    assert (answer.status, answer.json["error"]["param"]) == (422, "input")


def test_one_model(plain: Running, gateway: Running) -> None:
    client = openai.OpenAI(base_url=f"{plain.url}/v1", api_key="none", max_retries=0)
    assert client.models.retrieve("fake") == client.models.list().data[0]
    with pytest.raises(openai.NotFoundError, match="no such model; there are: fake"):
        client.models.retrieve("a/b")
