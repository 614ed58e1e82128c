"""Twenty calls of LangChain's client for OpenAI-compatible servers."""

from __future__ import annotations

import asyncio
from functools import reduce
from importlib.metadata import version
from operator import add

from harness import KEY, MODEL, PERSON, PLAIN, QUESTION, TOOLS, WEATHER, call, refused, report
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel


class Person(BaseModel):
    """Someone."""

    name: str
    age: int


def chat(url=PLAIN, **fields):
    return ChatOpenAI(
        base_url=f"{url}/v1", api_key=KEY, model=MODEL, max_retries=0, **{"max_tokens": 24, "temperature": 0, **fields}
    )


def text(message):
    assert message.content
    return message


def streamed(model, **fields):
    chunks = list(model.stream(QUESTION, **fields))
    assert "".join(chunk.content for chunk in chunks)
    return chunks


async def in_async():
    assert (await chat().ainvoke(QUESTION)).content
    assert [chunk async for chunk in chat().astream(QUESTION)]


def chain():
    prompt = ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "{question}")])
    assert (prompt | chat() | StrOutputParser()).invoke({"question": QUESTION})


def usage(message):
    assert message.usage_metadata["total_tokens"] > 0
    return message


def called(**fields):
    message = chat(TOOLS, max_tokens=100).bind_tools([WEATHER], **fields).invoke(QUESTION)
    assert message.tool_calls[0]["args"]["city"] in ("Hanoi", "Paris")
    return message


def after_a_call():
    first = called(tool_choice="any")
    result = ToolMessage("rain", tool_call_id=first.tool_calls[0]["id"])
    text(chat(TOOLS).bind_tools([WEATHER]).invoke([HumanMessage(QUESTION), first, result]))


def call_streamed():
    bound = chat(TOOLS, max_tokens=100).bind_tools([WEATHER], tool_choice="get_weather")
    whole = None
    for chunk in bound.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls[0]["name"] == "get_weather"


def structured(url, kind, **fields):
    model = chat(url, max_tokens=300).with_structured_output(kind, **fields)
    found = model.invoke("Someone named Bo who is 7, as JSON")
    assert found
    return found


def vectors():
    maker = OpenAIEmbeddings(base_url=f"{PLAIN}/v1", api_key=KEY, model=MODEL, check_embedding_ctx_length=False)
    one, (two, other) = maker.embed_query("Paris"), maker.embed_documents(["Paris", "a bicycle"])
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-3
    assert one != other


llm = OpenAI(base_url=f"{PLAIN}/v1", api_key=KEY, model=MODEL, max_tokens=8, temperature=0, max_retries=0)

call("invoke", lambda: text(chat().invoke(QUESTION)))
spoken = [SystemMessage("Be brief."), HumanMessage(QUESTION, name="bob"), AIMessage("Paris."), HumanMessage("Why?")]
call("invoke, messages of three kinds", lambda: text(chat().invoke(spoken)))
call("usage", lambda: usage(chat().invoke(QUESTION)))
call("stream", lambda: streamed(chat()))
call("stream with usage", lambda: usage(reduce(add, streamed(chat(stream_usage=True)))))
call("batch", lambda: [text(item) for item in chat().batch([QUESTION] * 3)])
call("ainvoke, astream", lambda: asyncio.run(in_async()))
call("a chain", chain)
call("stop", lambda: "Paris" not in chat(stop=["Paris"]).invoke(QUESTION).content or 1 / 0)
call("seed, top_p, penalties, n=1", lambda: text(chat(
    temperature=1, seed=3, top_p=0.9, n=1, presence_penalty=0.1, frequency_penalty=0.1).invoke(QUESTION)))  # fmt: skip
call("logprobs", lambda: chat(logprobs=True, top_logprobs=2).invoke(QUESTION).response_metadata["logprobs"]["content"])
call("structured output, json_schema", lambda: structured(PLAIN, Person, method="json_schema").age)
call("structured output, json_schema of a dict", lambda: structured(
    PLAIN, {"title": "person", "description": "someone", **PERSON}, method="json_schema")["name"] or 1 / 0)  # fmt: skip
call("structured output, function_calling", lambda: structured(TOOLS, Person, method="function_calling").age)
call("bind_tools, the model's choice", lambda: chat(TOOLS).bind_tools([WEATHER]).invoke(QUESTION))
call("bind_tools, any", lambda: called(tool_choice="any"))
call("bind_tools, and its result", after_a_call)
call("bind_tools, named, streamed", call_streamed)
call("OpenAI (completions), invoke and stream", lambda: (
    llm.invoke("The capital of France is") and "".join(llm.stream("The capital of France is"))) or 1 / 0)  # fmt: skip
call("embeddings", vectors)
refused("n=2 is refused", "n is not supported", lambda: chat(n=2, temperature=1).invoke(QUESTION))
report(f"langchain-openai {version('langchain-openai')}")
