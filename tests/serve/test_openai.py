"""The OpenAI client as judge: chat, streams, completions, models, log-probabilities, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest

from quantize.serve.service import RequestLimits
from tests.serve.conftest import Running, fakes, gateways


@pytest.fixture(scope="module")
def client(gateway: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)


def test_a_chat_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "one two three"}])
    assert answer.choices[0].message.content == "one two three "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 3, 6)
    assert answer.model == "fake"


def test_a_streamed_one_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "one two three"}],
            stream=True, stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "one two three "
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_without_being_asked_a_stream_has_no_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "one"}], stream=True)
    )
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_a_completion_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="fake", prompt="a b c")
    assert whole.choices[0].text == "a b c "
    streamed = client.completions.create(model="fake", prompt="a b c", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "a b c "


def test_the_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]


def test_max_tokens_and_stop_sequences(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "one two three four"}]
    cut = client.chat.completions.create(model="fake", messages=messages, max_tokens=2)  # type: ignore[call-overload]
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("one two ", "length")
    also = client.chat.completions.create(model="fake", messages=messages, max_completion_tokens=1)  # type: ignore[call-overload]
    assert also.choices[0].message.content == "one "
    stopped = client.chat.completions.create(model="fake", messages=messages, stop=["o th", "zzz"])  # type: ignore[call-overload]
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("one tw", "stop")


def test_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "one two"}], logprobs=True, top_logprobs=1
    )
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert [item.token for item in answer.choices[0].logprobs.content] == ["one ", "two "]
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].logprob == -0.5


@pytest.fixture(scope="module")
def strict() -> Iterator[Running]:
    """At most 50 tokens in and 512 out; the model has room for 500 in all."""
    with gateways() as run:
        yield run(fakes(context=500), limits=RequestLimits(max_input_tokens=50, max_output_tokens=512))


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model": "other"}, 404, "model_not_found", "model"),
        ({"temperature": 3}, 422, "invalid_value", "temperature"),
        ({"temperature": "1"}, 422, "invalid_value", "temperature"),
        ({"top_p": 0}, 422, "invalid_value", "top_p"),
        ({"max_tokens": 0}, 422, "invalid_value", "max_tokens"),
        ({"max_tokens": 500}, 422, "context_length_exceeded", "max_tokens"),
        ({"max_tokens": 600}, 422, "output_too_long", "max_tokens"),
        ({"n": 2}, 422, "unsupported_parameter", "n"),
        ({"tools": [{"type": "function"}]}, 422, "unsupported_parameter", "tools"),
        ({"response_format": {"type": "json_object"}}, 422, "unsupported_parameter", "response_format"),
        ({"grammar": 'root ::= "x"'}, 422, "unsupported_parameter", "grammar"),
        ({"top_k": 5}, 422, "unsupported_parameter", "top_k"),
        ({"messages": []}, 422, "invalid_value", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 422, "unsupported_parameter", "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, 422, "empty_prompt", None),
        ({"max_tokens": 9, "messages": [{"role": "user", "content": "word " * 59}]}, 413, "input_too_long", None),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            422,
            "unsupported_parameter",
            "messages",
        ),
    ],
)
def test_what_can_not_be_done_is_said(
    strict: Running, fields: dict[str, object], status: int, code: str, param: str | None
) -> None:
    answer = strict.chat("one two", **fields)
    error = answer.json["error"]
    assert (answer.status, error["code"], error["param"]) == (status, code, param)
    assert set(error) == {"message", "type", "param", "code"}
    client = openai.OpenAI(base_url=f"{strict.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIStatusError, match=r".") as caught:
        client.post(
            "/chat/completions", body={"messages": [{"role": "user", "content": "a"}], **fields}, cast_to=object
        )
    assert caught.value.status_code == status


def test_an_unknown_model_is_told_the_known_ones(gateway: Running) -> None:
    assert "fake" in gateway.chat("hi", model="other").json["error"]["message"]


def test_text_parts_and_the_developer_role(gateway: Running) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "zero"}, {"role": "user", "content": parts}]
    answer = gateway.ask("POST", "/v1/chat/completions", {"messages": messages})
    assert answer.json["choices"][0]["message"]["content"] == "zero one two "


def test_the_stream_is_what_the_standard_says(gateway: Running) -> None:
    answer = gateway.chat("one two", stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert all(json.loads(json.dumps(event))["object"] == "chat.completion.chunk" for event in answer.events[:-1])
    assert {event["trace_id"] for event in answer.events[:-1]} == {answer.headers["x-request-id"]}
