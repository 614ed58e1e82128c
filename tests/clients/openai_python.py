"""Twenty calls of the OpenAI Python client."""

from __future__ import annotations

import asyncio
import json
import math

import openai
from harness import KEY, MODEL, PERSON, PLAIN, QUESTION, TOOLS, WEATHER, call, refused, report
from pydantic import BaseModel, ConfigDict


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    age: int


client = openai.OpenAI(base_url=f"{PLAIN}/v1", api_key=KEY, max_retries=0)
with_tools = openai.OpenAI(base_url=f"{TOOLS}/v1", api_key=KEY, max_retries=0)
ASKED = [{"role": "user", "content": QUESTION}]
DEFAULTS = {
    "n": 1, "stop": None, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0, "store": False, "tools": [],
    "tool_choice": "none", "parallel_tool_calls": False, "metadata": {}, "service_tier": "auto", "modalities": ["text"],
    "user": "someone", "logprobs": False, "response_format": {"type": "text"}, "verbosity": "medium",
}  # fmt: skip


def chat(**fields):
    return client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=24, **fields)


def is_text(answer):
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens > 0
    return answer


def streamed(**fields):
    chunks = list(chat(stream=True, **fields))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    return chunks


def same_twice():
    one, two = (chat(temperature=1.0, seed=7).choices[0].message.content for _ in range(2))
    assert one == two


def has_logprobs():
    found = chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert all(item.logprob <= 0 and len(item.top_logprobs) == 3 for item in found)


def stops():
    answer = client.chat.completions.create(
        model=MODEL, messages=ASKED, max_completion_tokens=24, stop=["Paris", "zzz"]
    )
    assert "Paris" not in (answer.choices[0].message.content or "")


def as_json():
    answer = client.chat.completions.create(
        model=MODEL, messages=ASKED, max_tokens=200, temperature=0, response_format={"type": "json_object"}
    )
    assert answer.choices[0].finish_reason == "length" or isinstance(
        json.loads(answer.choices[0].message.content), dict
    )


def parsed():
    asked = [{"role": "user", "content": "Someone named Bo who is 7, as JSON"}]
    answer = client.chat.completions.parse(model=MODEL, messages=asked, response_format=Person, max_tokens=300)
    assert isinstance(answer.choices[0].message.parsed, Person)


def schema_streamed():
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
    chunks = client.chat.completions.create(
        model=MODEL, messages=ASKED, max_tokens=300, stream=True, response_format=wanted
    )
    assert Person.model_validate_json("".join(chunk.choices[0].delta.content or "" for chunk in chunks))


def again():
    first = chat().choices[0].message
    more = [*ASKED, first.model_dump(), {"role": "user", "content": [{"type": "text", "text": "And of Italy?"}]}]
    is_text(client.chat.completions.create(model=MODEL, messages=more, max_tokens=16))


def vectors():
    found = client.embeddings.create(model=MODEL, input=["Paris", "a bicycle"]).data
    plain = client.embeddings.create(model=MODEL, input="Paris", encoding_format="float").data[0].embedding
    assert len(found) == 2
    assert math.isclose(sum(a * b for a, b in zip(found[0].embedding, plain, strict=True)), 1, abs_tol=1e-3)


def called(choice):
    answer = with_tools.chat.completions.create(
        model=MODEL, messages=ASKED, tools=[WEATHER], tool_choice=choice, max_tokens=100
    )
    (found,) = answer.choices[0].message.tool_calls
    assert json.loads(found.function.arguments)["city"] in ("Hanoi", "Paris")
    return answer.choices[0].message


def call_streamed():
    with with_tools.chat.completions.stream(
        model=MODEL, messages=ASKED, tools=[WEATHER], tool_choice="required", max_tokens=100
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.name == "get_weather"


async def in_parallel():
    async with openai.AsyncOpenAI(base_url=f"{PLAIN}/v1", api_key=KEY, max_retries=0) as many:
        answers = await asyncio.gather(
            *(many.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=8) for _ in range(4))
        )
    assert all(answer.choices[0].message.content for answer in answers)


def completes(**fields):
    return client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=8, **fields)


call("models.list", lambda: client.models.list().data[0].id == MODEL or 1 / 0)
call("models.retrieve", lambda: client.models.retrieve(MODEL).id == MODEL or 1 / 0)
call("chat", lambda: is_text(chat()))
call("chat, every default said", lambda: is_text(chat(**DEFAULTS)))
call("chat, streamed", streamed)
call("chat, streamed with usage", lambda: streamed(stream_options={"include_usage": True})[-1].usage.total_tokens)
call("chat, goes on with the dumped answer", again)
call("chat, seed", same_twice)
call("chat, stop and max_completion_tokens", stops)
call("chat, logprobs", has_logprobs)
call("chat, json_object", as_json)
call("chat.parse of a pydantic class", parsed)
call("chat, json_schema streamed", schema_streamed)
call("chat, four at once, async", lambda: asyncio.run(in_parallel()))
call("completions", lambda: completes(echo=False, best_of=1, logit_bias={}).choices[0].text or 1 / 0)
call("completions, streamed", lambda: "".join(chunk.choices[0].text for chunk in completes(stream=True)) or 1 / 0)
call("embeddings, base64 and float", vectors)
message = call("tools, required", lambda: called("required"))
call("tools, named, and its result", lambda: is_text(with_tools.chat.completions.create(
    model=MODEL, tools=[WEATHER], max_tokens=24,
    messages=[*ASKED, called({"type": "function", "function": {"name": "get_weather"}}).model_dump(),
              {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}])))  # fmt: skip
call("tools, required, streamed", call_streamed)
refused("n=2 is refused", "n is not supported", lambda: chat(n=2))
refused("tools without a template for them are refused", "tools", lambda: chat(tools=[WEATHER]))
report(f"openai (Python) {openai.__version__}")
