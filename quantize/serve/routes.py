"""The endpoints: what each reads, asks and writes. Names and shapes are those of docs/gateway.md.

In: a parsed request. Out: JSON or server-sent events. How models are chosen and limited is the service's.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from quantize.serve import protocol
from quantize.serve.edge import STATE, Receive, RequestState, Scope, Send
from quantize.serve.engines.base import Call, Engine
from quantize.serve.failures import ClientGone, Failure
from quantize.serve.monitoring import memory_line, on_gpus
from quantize.serve.protocol import (
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    GenerateRequest,
    SimpleAnswer,
    SimpleChatRequest,
)
from quantize.serve.service import Live, Service, relay
from quantize.system.machine import resident_bytes

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
DISCARDED_BYTES, DISCARD_SECONDS = 64 << 20, 1.0  # of a body that is too large, read before it is refused
ERRORS = {
    400: "not JSON", 401: "no valid API key", 404: "no such model", 408: "the body did not come in time",
    413: "the body or the input is too large", 415: "not application/json", 422: "a field does not fit",
    429: "too many requests: see Retry-After", 502: "the upstream failed", 503: "the model is not ready",
    504: "no answer in time",
}  # fmt: skip


def make_router(service: Service, started: float) -> APIRouter:
    """All endpoints but the page and the documentation."""
    router = APIRouter()
    _add_generation(router, service)
    _add_state(router, service, started)
    return router


def _add_generation(router: APIRouter, service: Service) -> None:
    @router.post("/v1/chat/completions", **_documented(ChatRequest, protocol.Completion, streams=True))
    async def chat_completions(request: Request) -> Response:
        """OpenAI's chat completions."""
        return await _openai(service, request, ChatRequest)

    @router.post("/v1/completions", **_documented(CompletionRequest, protocol.Completion, streams=True))
    async def completions(request: Request) -> Response:
        """OpenAI's older completions: a prompt as it is."""
        return await _openai(service, request, CompletionRequest)

    @router.post("/v1/embeddings", **_documented(EmbeddingRequest, protocol.Embeddings))
    async def embeddings(request: Request) -> Response:
        """OpenAI's embeddings: a vector for each text."""
        return await _openai(service, request, EmbeddingRequest)

    @router.post("/chat", **_documented(SimpleChatRequest, SimpleAnswer))
    async def chat(request: Request) -> Response:
        """One message, one answer."""
        asked = protocol.parse(SimpleChatRequest, await _body(service, request))
        system = [{"role": "system", "content": asked.system}] if asked.system else []
        fields = {
            "messages": [*system, {"role": "user", "content": asked.message}],
            "temperature": asked.temperature,
            "max_tokens": asked.max_tokens,
        }
        return await _simple(service, request, ChatRequest, fields, asked.model)

    @router.post("/v1/generate", **_documented(GenerateRequest, SimpleAnswer))
    async def generate(request: Request) -> Response:
        """Goes on with a prompt."""
        asked = protocol.parse(GenerateRequest, await _body(service, request))
        fields = {
            "prompt": asked.prompt,
            "temperature": asked.temperature if asked.do_sample else 0.0,
            "top_p": asked.top_p if asked.do_sample else 1.0,
            "max_tokens": asked.max_tokens,
        }
        return await _simple(service, request, CompletionRequest, fields, asked.model)


def _add_state(router: APIRouter, service: Service, started: float) -> None:
    @router.get("/health", response_model=None)
    async def health() -> Response:
        """The process is up. Says nothing of the models: that is /ready."""
        active = sum(slots.active for slots in service.slots.values())
        waiting = sum(slots.waiting for slots in service.slots.values())
        return _json({
            "status": "ok",
            "uptime_seconds": round(time.monotonic() - started, 1),
            "active_requests": active,
            "waiting_requests": waiting,
            "memory_rss_mb": _memory_mb(list(service.router.engines.values())),
            "memory": memory_line("Now", on_gpus(service.router.engines.values())),
        })  # fmt: skip

    @router.get("/ready", response_model=None, responses={503: {"description": "a model does not answer, with why"}})
    async def ready() -> Response:
        """Whether the models really answer; 503 with the reason until then."""
        missing = service.router.not_ready()
        reason = "; ".join(f"{name}: {why}" for name, why in missing.items())
        data = {"status": "not ready" if missing else "ready", "reason": reason or None, "models": _models(service)}
        return _json(data, 503 if missing else 200)

    @router.get("/metrics", response_model=None, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/models", response_model=protocol.ModelList, responses=_errors(401, 429))
    async def models() -> Response:
        """The models that this gateway answers for."""
        return _json({"object": "list", "data": [card(engine) for engine in service.router.engines.values()]})

    @router.get("/v1/models/{model:path}", response_model=protocol.ModelCard, responses=_errors(401, 404, 429))
    async def model(model: str) -> Response:
        """One of them."""
        return _json(card(service.router.find(model)))

    created = int(time.time() - (time.monotonic() - started))

    def card(engine: Engine) -> dict[str, Any]:
        ready, default = engine.status.ready, engine.name == service.router.rules.default
        return {"id": engine.name, "object": "model", "created": created, "owned_by": "quantize", "ready": ready,
                "runtime": engine.runtime, "default": default}  # fmt: skip


async def _openai(service: Service, request: Request, kind: type[AnyRequest]) -> Response:
    body = await _body(service, request)
    asked = protocol.parse(kind, body)
    state: RequestState = request.scope[STATE]
    call = _call(service, state, asked, body)
    if not getattr(asked, "stream", None):
        answer, engine = await service.complete(call)
        state.model, state.runtime = engine.name, engine.runtime
        return _json(answer)
    live = await service.open_stream(call)
    state.model, state.runtime = live.engine.name, live.engine.runtime
    return StreamResponse(live, call, state, service)


async def _simple(
    service: Service, request: Request, kind: type[ChatRequest] | type[CompletionRequest],
    fields: dict[str, Any], model: str | None,
) -> Response:  # fmt: skip
    state: RequestState = request.scope[STATE]
    fields = {**fields, "model": model} if model is not None else fields
    body = orjson.dumps(fields)
    call = _call(service, state, kind.model_validate_json(body), body)
    answer, engine = await service.complete(call)
    state.model, state.runtime = engine.name, engine.runtime
    choice = answer["choices"][0]
    text = choice["message"]["content"] if call.is_chat else choice["text"]
    return _json({
        "answer": text or "",
        "model": engine.name,
        "runtime": engine.runtime,
        "latency_ms": round((time.monotonic() - state.started) * 1000, 2),
        "memory_rss_mb": _memory_mb([engine]),
        "trace_id": state.trace_id,
    })  # fmt: skip


def _call(service: Service, state: RequestState, asked: AnyRequest, body: bytes) -> Call:
    limit = service.limits.max_output_tokens
    for field in ("max_tokens", "max_completion_tokens"):
        wanted = getattr(asked, field, None)
        if limit is not None and wanted is not None and wanted > limit:
            raise Failure(422, "output_too_long", f"{field} is more than the limit of {limit}", param=field)
    state.call = Call(asked, body, state.trace_id, service.limits.max_input_tokens, limit)
    return state.call


async def _body(service: Service, request: Request) -> bytes:
    """The body, within its size and time. From here on a client that goes away ends the request."""
    state: RequestState = request.scope[STATE]
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Failure(415, "not_json", "send the body as content-type: application/json")
    limit = service.limits.max_body_bytes
    too_large = Failure(413, "body_too_large", f"the body is larger than {limit} bytes")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        await _discard(request)
        raise too_large
    parts: list[bytes] = []
    try:
        async with asyncio.timeout(service.limits.body_seconds):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                parts.append(message.get("body", b""))
                state.bytes_in += len(parts[-1])
                more = bool(message.get("more_body"))
                if not more or state.bytes_in > limit:
                    break
    except TimeoutError:
        raise Failure(408, "body_too_slow", f"no whole body within {service.limits.body_seconds:g} s") from None
    if state.bytes_in > limit:
        if more:
            await _discard(request)
        raise too_large
    state.watch(request.receive)
    return b"".join(parts)


async def _discard(request: Request) -> None:
    """Let a client finish what it sends, within reason: one that is cut off may never see why it was refused."""
    left = DISCARDED_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while left > 0:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                left -= len(message.get("body", b""))
                if not message.get("more_body"):
                    return


class StreamResponse(Response):
    """A stream of server-sent events; closes the stream whatever happens."""

    def __init__(self, live: Live, call: Call, state: RequestState, service: Service) -> None:
        super().__init__()
        self._live, self._call, self._state, self._service = live, call, state, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""

        async def write(event: bytes) -> None:
            await send({"type": "http.response.body", "body": event, "more_body": True})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
            self._state.failure = await relay(self._live, self._call, write, self._service.limits)
        finally:
            await self._live.close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _json(data: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(data), status, media_type="application/json")


def _memory_mb(engines: list[Engine]) -> float:
    total = resident_bytes() + sum(engine.memory_bytes() for engine in engines)
    return round(total / 1e6, 1)


def _models(service: Service) -> dict[str, Any]:
    kept = ("device", "devices", "kernel", "context", "slots", "load_seconds", "warnings", "model")
    return {
        name: {
            "state": engine.status.state,
            "percent": engine.status.percent,
            "reason": engine.status.reason or None,
            "runtime": engine.runtime,
            **{key: engine.status.details[key] for key in kept if key in engine.status.details},
        }
        for name, engine in service.router.engines.items()
    }


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": protocol.ErrorBody, "description": ERRORS[status]} for status in statuses}


def _documented(body: type[Any], answer: type[Any], *, streams: bool = False) -> dict[str, Any]:
    """What OpenAPI says of a route that reads its body itself."""
    content: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}} if streams else {}
    return {
        "response_model": answer,
        "responses": {200: {"content": content}, **_errors(*ERRORS)},
        "openapi_extra": {
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}},
            }
        },
    }
