"""A local model as an Engine: OpenAI's requests to a child's orders, the child's frames to OpenAI's answers.

In: a Call. Out: dicts and server-sent events. Fields that the model can't honour are a 422 that names them.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import orjson

from quantize.serve.engines.base import Call, EngineTarget, Status
from quantize.serve.engines.embeddings import embed
from quantize.serve.engines.link import Link, Listener, ProcessChild
from quantize.serve.engines.messages import template_message
from quantize.serve.engines.tools import CallReader, ToolWish, wish_of
from quantize.serve.failures import Failure, not_ready, refuse_unknown, unsupported
from quantize.serve.neutral import asks_for_nothing
from quantize.serve.protocol import ChatRequest, CompletionRequest, EmbeddingRequest
from quantize.system.machine import resident_bytes

Generating = ChatRequest | CompletionRequest
DONE = b"data: [DONE]\n\n"
LEAST_TEMPERATURE = 1e-3  # below it sampling is greedy: dividing by it overflows
DEFAULT_TEMPERATURE, DEFAULT_TOP_P = 0.7, 0.9  # as /v1/generate has them; OpenAI's 1 and 1 let small models ramble


class LocalEngine:
    """See Engine. tell(event, facts): what happens to the child, and what each generation did to memory."""

    def __init__(self, target: EngineTarget, tell: Listener, launch: Callable[[], Any] = ProcessChild.start) -> None:
        self.name = target.name
        self._tell = tell
        self._link = Link(target, tell, launch)

    @property
    def status(self) -> Status:
        """See Engine."""
        return self._link.status

    @property
    def runtime(self) -> str:
        """See Engine."""
        return self._link.target.runtime or self._link.target.kind.name

    async def start(self) -> None:
        """See Engine."""
        self._link.start()

    async def stop(self) -> None:
        """See Engine."""
        await self._link.stop()

    def memory_bytes(self) -> int:
        """See Engine."""
        return resident_bytes(self._link.pid) if self._link.pid else 0

    @property
    def pid(self) -> int | None:
        """Of the model's process."""
        return self._link.pid

    async def complete(self, call: Call) -> dict[str, Any]:
        """See Engine."""
        self._check_ready()
        request = call.request
        if isinstance(request, EmbeddingRequest):
            supports = self.status.details.get("supports", ())
            return await embed(call, request, self._link, self.name, self.runtime, supports)
        wish = self._wish(request)
        text: list[str] = []
        logprobs: list[dict[str, Any]] = []
        finish = ""
        async with aclosing(self._frames(call, self._order(call, request, wish))) as frames:
            async for frame in frames:
                if "text" in frame:
                    text.append(frame["text"])
                    logprobs += frame["logprobs"]
                elif "end" in frame:
                    finish = frame["end"]["finish"]
        choice = _choice(call, "".join(text), logprobs, finish, whole=True)
        if wish is not None:
            _put_calls(choice, wish.reader())
        return {**self._head(call, whole=True), "choices": [choice], "usage": _usage(call), "trace_id": call.trace_id}

    async def stream(self, call: Call) -> AsyncGenerator[bytes]:
        """See Engine."""
        self._check_ready()
        request = call.request
        assert not isinstance(request, EmbeddingRequest)
        head = {**self._head(call, whole=False), "trace_id": call.trace_id}
        wish = self._wish(request)
        reader = wish.reader() if wish is not None else None
        async with aclosing(self._frames(call, self._order(call, request, wish))) as frames:
            async for frame in frames:
                if "start" in frame:
                    if call.is_chat:
                        first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                        yield _event({**head, "choices": [first]})
                elif "text" in frame:
                    if reader is None:
                        choice = _choice(call, frame["text"], frame["logprobs"], None, whole=False)
                        yield _event({**head, "choices": [choice]})
                    else:
                        for choice in _deltas(reader.add(frame["text"]), frame["logprobs"]):
                            yield _event({**head, "choices": [choice]})
                else:
                    for choice in _deltas(reader.flush(), []) if reader is not None else ():
                        yield _event({**head, "choices": [choice]})
                    finish = _finish(frame["end"]["finish"], reader)
                    yield _event({**head, "choices": [_choice(call, "", [], finish, whole=False)]})
        if call.wants_usage:
            yield _event({**head, "choices": [], "usage": _usage(call)})
        yield DONE

    def _check_ready(self) -> None:
        """Before what it can do is asked, which is not known earlier. Raises Failure."""
        if not self.status.ready:
            raise not_ready(self.name, self.status.reason)

    async def _frames(self, call: Call, order: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """The child's frames; counts tokens into the call on the way."""
        async with aclosing(self._link.frames(order)) as frames:
            async for frame in frames:
                if "start" in frame:
                    call.prompt_tokens = frame["start"]["prompt_tokens"]
                    self._tell("generation_started", {"trace_id": call.trace_id, **frame["start"]})
                elif "text" in frame:
                    call.saw_token()
                    call.completion_tokens = frame["tokens"]
                else:
                    call.saw_token()
                    call.completion_tokens = frame["end"]["tokens"]
                    self._tell("generation_ended", {"trace_id": call.trace_id, **frame["end"]})
                yield frame

    def _order(self, call: Call, request: Generating, wish: ToolWish | None) -> dict[str, Any]:
        stop = [request.stop] if isinstance(request.stop, str) else list(request.stop or ())
        temperature = DEFAULT_TEMPERATURE if request.temperature is None else request.temperature
        order: dict[str, Any] = {
            "max_tokens": _max_tokens(request),
            "max_input_tokens": call.max_input_tokens,
            "max_output_tokens": call.max_output_tokens,
            "stop": [text for text in stop if text],
            "sampling": {
                "temperature": temperature if temperature > LEAST_TEMPERATURE else 0.0,
                "top_p": DEFAULT_TOP_P if request.top_p is None else request.top_p,
                "top_k": request.top_k or 0,
                "min_p": request.min_p or 0.0,
                "seed": request.seed,
                "presence_penalty": request.presence_penalty or 0.0,
                "frequency_penalty": request.frequency_penalty or 0.0,
                "repetition_penalty": request.repetition_penalty or 1.0,
                "logprobs": _logprobs(request),
            },
        }
        fit = _fit(request, wish)
        if fit:
            order["fit"] = fit
        if isinstance(request, ChatRequest):
            knows_tools = bool(self.status.details.get("tool_style"))
            order["messages"] = [
                template_message(item, self.runtime, knows_tools=knows_tools) for item in request.messages
            ]
            order |= wish.order() if wish is not None else {}
        else:
            order["prompt"] = _prompt(request)
        return order

    def _refuse_what_it_cannot(self, request: Generating) -> None:
        refuse_unknown(request.model_extra, self.runtime)
        for field, value in ((request.stream_options and request.stream_options.model_extra) or {}).items():
            if not asks_for_nothing(field, value):
                raise unsupported("stream_options", self.runtime, f": {field[:40]}" if field.isidentifier() else "")
        if request.n not in (None, 1):
            raise unsupported("n", self.runtime, ": one answer a request")
        has = set(self.status.details.get("supports", ()))
        wants = {
            "top_k": bool(request.top_k),
            "min_p": bool(request.min_p),
            "presence_penalty": bool(request.presence_penalty) and "penalties" not in has,
            "frequency_penalty": bool(request.frequency_penalty) and "penalties" not in has,
            "repetition_penalty": request.repetition_penalty not in (None, 1.0),
            "logprobs": _logprobs(request) is not None,
            "grammar": request.grammar is not None,
            "response_format": _json_schema(request) is not None and "json" not in has,
        }
        for field, wanted in wants.items():
            if wanted and field not in has:
                raise unsupported(field, self.runtime)
        if request.grammar is not None and _json_schema(request) is not None:
            raise Failure(422, "invalid_value", "grammar and response_format exclude each other", param="grammar")

    def _wish(self, request: Generating) -> ToolWish | None:
        """What it is to do with tools, of a request that it can do. Raises Failure."""
        self._refuse_what_it_cannot(request)
        if not isinstance(request, ChatRequest):
            return None
        details = self.status.details
        has_grammar = "json" in details.get("supports", ())
        return wish_of(request, details.get("tool_style", ""), has_grammar=has_grammar, runtime=self.runtime)

    def _head(self, call: Call, *, whole: bool) -> dict[str, Any]:
        prefix = "chatcmpl" if call.is_chat else "cmpl"
        kind = ("chat.completion" if whole else "chat.completion.chunk") if call.is_chat else "text_completion"
        return {"id": f"{prefix}-{call.trace_id}", "object": kind, "created": call.created, "model": self.name}


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


def _choice(
    call: Call, text: str, logprobs: list[dict[str, Any]], finish: str | None, *, whole: bool
) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0}
    if not call.is_chat:
        choice["text"] = text
        choice["logprobs"] = _text_logprobs(logprobs) if logprobs else None
    elif whole:
        choice["message"] = {"role": "assistant", "content": text}
        choice["logprobs"] = {"content": logprobs} if logprobs else None
    else:
        choice["delta"] = {"content": text} if text else {}
        choice["logprobs"] = {"content": logprobs} if logprobs else None
    return {**choice, "finish_reason": finish}


def _deltas(deltas: list[dict[str, Any]], logprobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choices of a stream from what a CallReader gave. Log-probabilities come with the text of their step, if any."""
    given = {"content": logprobs} if logprobs else None
    rows = deltas or ([{}] if given else [])
    return [
        {"index": 0, "delta": delta, "logprobs": given if number == 0 else None, "finish_reason": None}
        for number, delta in enumerate(rows)
    ]


def _put_calls(choice: dict[str, Any], reader: CallReader) -> None:
    """Turn the text of a whole answer into text and calls."""
    message = choice["message"]
    deltas = [*reader.add(message["content"]), *reader.flush()]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    if calls:
        message["content"] = "".join(delta.get("content", "") for delta in deltas) or None
        message["tool_calls"] = [{key: call[key] for key in ("id", "type", "function")} for call in calls]
    choice["finish_reason"] = _finish(choice["finish_reason"], reader)


def _finish(reason: str, reader: CallReader | None) -> str:
    return "tool_calls" if reason == "stop" and reader is not None and reader.calls else reason


def _text_logprobs(logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    """OpenAI's older shape, for /v1/completions."""
    offsets, position = [], 0
    tops: list[dict[str, float]] = []
    for item in logprobs:
        offsets.append(position)
        position += len(item["token"])
        tops.append({})
        for top in item["top_logprobs"]:  # tokens that are no text on their own look the same: the likeliest counts
            tops[-1].setdefault(top["token"], top["logprob"])
    return {
        "tokens": [item["token"] for item in logprobs],
        "token_logprobs": [item["logprob"] for item in logprobs],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _usage(call: Call) -> dict[str, int]:
    total = call.prompt_tokens + call.completion_tokens
    return {
        "prompt_tokens": call.prompt_tokens,
        "completion_tokens": call.completion_tokens,
        "total_tokens": total,
    }


def _max_tokens(request: Generating) -> int | None:
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        return request.max_completion_tokens
    return request.max_tokens


def _logprobs(request: Generating) -> int | None:
    if isinstance(request, ChatRequest):
        return (request.top_logprobs or 0) if request.logprobs else None
    return request.logprobs


def _fit(request: Generating, wish: ToolWish | None) -> dict[str, Any]:
    """What the answer must fit, and the field that says so."""
    if request.grammar is not None:
        return {"grammar": request.grammar, "param": "grammar"}
    if wish is not None and wish.forced:
        return {"json_schema": json.dumps(wish.schema()), "param": "tools"}
    schema = _json_schema(request)
    return {} if schema is None else {"json_schema": json.dumps(schema), "param": "response_format"}


def _json_schema(request: Generating) -> dict[str, Any] | None:
    """The schema of the answer; None for text."""
    if not isinstance(request, ChatRequest) or request.response_format is None:
        return None
    chosen = request.response_format
    if chosen.type == "json_schema":
        if chosen.json_schema is None or chosen.json_schema.schema_ is None:
            message = "response_format.json_schema.schema is missing"
            raise Failure(422, "invalid_value", message, param="response_format")
        return chosen.json_schema.schema_
    return {"type": "object"} if chosen.type == "json_object" else None


def _prompt(request: CompletionRequest) -> str | list[int]:
    prompt: Any = request.prompt
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str) or (prompt and all(isinstance(token, int) for token in prompt)):
        checked: str | list[int] = prompt
        return checked
    raise Failure(422, "invalid_value", "prompt: one text, or one list of token ids, a request", param="prompt")
