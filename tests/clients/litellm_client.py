"""Twenty calls of the LiteLLM client, with the gateway as an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import json
from importlib.metadata import version

import litellm
from harness import KEY, MODEL, PERSON, PLAIN, QUESTION, TOOLS, WEATHER, call, refused, report

ASKED = [{"role": "user", "content": QUESTION}]


def fields(url=PLAIN, **more):
    return {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": KEY, "max_retries": 0, **more}


def chat(url=PLAIN, messages=ASKED, max_tokens=24, **more):
    return litellm.completion(messages=messages, max_tokens=max_tokens, **fields(url, **more))


def text(answer):
    assert answer.choices[0].message.content
    return answer


def streamed(**more):
    chunks = list(chat(stream=True, **more))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    return chunks


async def in_async():
    answer = await litellm.acompletion(messages=ASKED, max_tokens=8, **fields())
    assert answer.choices[0].message.content
    chunks = await litellm.acompletion(messages=ASKED, max_tokens=8, stream=True, **fields())
    assert [chunk async for chunk in chunks]


def called(**more):
    answer = chat(TOOLS, tools=[WEATHER], max_tokens=100, **more)
    (found,) = answer.choices[0].message.tool_calls
    assert json.loads(found.function.arguments)["city"] in ("Hanoi", "Paris")
    return answer.choices[0].message


def after_a_call():
    first = called(tool_choice="required")
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "rain"}
    text(chat(TOOLS, messages=[*ASKED, first.model_dump(), result], tools=[WEATHER]))


def call_streamed():
    chunks = list(chat(TOOLS, tools=[WEATHER], tool_choice="required", max_tokens=100, stream=True))
    whole = litellm.stream_chunk_builder(chunks, messages=ASKED)
    assert whole.choices[0].message.tool_calls[0].function.name == "get_weather"


def as_json(**wanted):
    answer = chat(max_tokens=300, temperature=0, response_format=wanted)
    assert answer.choices[0].finish_reason == "length" or json.loads(answer.choices[0].message.content) is not None


def vectors(given, **more):
    data = litellm.embedding(input=given, **fields(**more)).data
    assert all(len(item["embedding"]) > 100 for item in data)
    assert len(data) == len(given)


SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}

call("completion", lambda: text(chat()))
parts = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
call("completion, system and parts", lambda: text(chat(messages=parts)))
call("completion, goes on with the dumped answer", lambda: text(chat(messages=[
    *ASKED, chat().choices[0].message.model_dump(), {"role": "user", "content": "Italy?"}])))  # fmt: skip
call("completion, n, user, penalties, seed", lambda: text(chat(
    n=1, user="me", seed=3, temperature=1, top_p=0.9, presence_penalty=0, frequency_penalty=0.1)))  # fmt: skip
call("completion, defaults said", lambda: text(chat(
    logit_bias={}, parallel_tool_calls=False, stop="", tool_choice="none", tools=[])))  # fmt: skip
call("streamed", streamed)
call("streamed with usage", lambda: streamed(stream_options={"include_usage": True})[-1].usage.total_tokens or 1 / 0)
call("acompletion, whole and streamed", lambda: asyncio.run(in_async()))
call("batch_completion", lambda: [text(item) for item in litellm.batch_completion(
    messages=[ASKED, ASKED], max_tokens=8, **fields())])  # fmt: skip
call("stop", lambda: "Paris" not in (chat(stop=["Paris"]).choices[0].message.content or "") or 1 / 0)
call("logprobs", lambda: chat(logprobs=True, top_logprobs=2).choices[0].logprobs.content or 1 / 0)
call("json_object", lambda: as_json(type="json_object"))
call("json_schema", lambda: as_json(**SCHEMA))
completes = {**fields(), "model": f"text-completion-openai/{MODEL}", "prompt": "The capital of France is"}
call("text_completion", lambda: litellm.text_completion(max_tokens=8, **completes).choices[0].text or 1 / 0)
call("embedding of one", lambda: vectors(["Paris"]))
call("embedding of three, float", lambda: vectors(["Paris", "a bicycle", "x"], encoding_format="float"))
call("tools, the model's choice", lambda: chat(TOOLS, tools=[WEATHER], tool_choice="auto"))
call("tools, named", lambda: called(tool_choice={"type": "function", "function": {"name": "get_weather"}}))
call("tools, required, and its result", after_a_call)
call("tools, required, streamed", call_streamed)
refused("n=2 is refused", "n is not supported", lambda: chat(n=2))
report(f"litellm {version('litellm')}")
