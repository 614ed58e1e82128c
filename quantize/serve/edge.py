"""The outermost layer of the application: trace ids, keys, rates, errors, the access log, metrics. Plain ASGI.

In: every request. Out: the inner application's answer with x-request-id, or an error object. Nothing that a client
sent is logged but its method and the name of the route that it met.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.responses import Response

from quantize.serve.engines.base import Call
from quantize.serve.failures import Failure
from quantize.serve.limits import Keys, Rates
from quantize.serve.logs import Log, where
from quantize.serve.monitoring import Facts, Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SANE_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}")
CLIENT_GONE = 499  # nginx's number, for the log: no answer is sent
PROTECTED = ("/v1/", "/chat")
QUIET_ROUTES = frozenset({"/health", "/ready", "/metrics"})
STATE = "quantize.request"
INTERNAL = ("internal_error", "the gateway failed; its log has more")
RETRY_SECONDS = 5  # after a gateway that ends, another may be there
EVENTS = b"text/event-stream"


@dataclass(eq=False)
class RequestState:
    """What is known of a request while it runs; routes fill in what they learn."""

    trace_id: str
    started: float = field(default_factory=time.monotonic)
    owner: str | None = None
    status: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    call: Call | None = None
    model: str | None = None
    runtime: str | None = None
    failure: Failure | None = None
    streams: bool = False
    gone: bool = False
    stopped: bool = False
    over: bool = False
    task: asyncio.Task[Any] | None = None
    watcher: asyncio.Task[None] | None = None

    def watch(self, receive: Receive) -> None:
        """From now on, cancel this request as soon as its client is gone. The body must have been read."""
        task = asyncio.current_task()

        async def wait() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            if not self.over and task is not None:
                self.gone = True
                task.cancel()

        self.watcher = asyncio.create_task(wait())


class Edge:
    """Wraps the application."""

    def __init__(self, app: App, keys: Keys, rates: Rates, metrics: Metrics, log: Log) -> None:
        self._app = app
        self._keys = keys
        self._rates = rates
        self._metrics = metrics
        self._log = log
        self._running: set[RequestState] = set()

    def stop(self) -> None:
        """End what is under way: each request is told."""
        for state in [*self._running]:
            state.stopped = True
            if state.task is not None:
                state.task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        sane = SANE_ID.fullmatch(given) is not None
        state = RequestState(given.decode("ascii") if sane else uuid.uuid4().hex)
        state.task = asyncio.current_task()
        scope[STATE] = state
        self._running.add(state)
        trace = (b"x-request-id", state.trace_id.encode())

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                state.status = message["status"]
                state.streams = any(value.startswith(EVENTS) for _, value in message.get("headers", ()))
                message["headers"] = [*message.get("headers", ()), trace]
            else:
                state.bytes_out += len(message.get("body", b""))
            await send(message)

        try:
            self._admit(scope, state, headers)
            await self._app(scope, receive, tell)
        except Failure as exc:
            await self._fail(exc, scope, receive, tell)
        except asyncio.CancelledError:
            if not (state.gone or state.stopped):
                raise
            self._forgive(state)
            if state.stopped:
                message = "the gateway is ending: ask again, or another"
                failure = Failure(503, "stopping", message, retry_after=RETRY_SECONDS)
                await self._fail(failure, scope, receive, tell)
        except Exception as exc:  # noqa: BLE001 - the last place before the client
            self._log.error("internal_error", trace_id=state.trace_id, error=where(exc))
            await self._fail(Failure(500, *INTERNAL), scope, receive, tell)
        finally:
            state.over = True
            self._running.discard(state)
            if state.watcher is not None:
                state.watcher.cancel()
            self._account(scope, state)

    def _admit(self, scope: Scope, state: RequestState, headers: dict[bytes, bytes]) -> None:
        path: str = scope["path"]
        if not path.startswith(PROTECTED[0]) and path != PROTECTED[1]:
            return
        if self._keys:
            state.owner = self._keys.owner(headers.get(b"authorization"))
        self._rates.spend(state.owner or "")

    async def _fail(self, failure: Failure, scope: Scope, receive: Receive, send: Send) -> None:
        state: RequestState = scope[STATE]
        state.failure = failure
        if not state.status:
            await failure_response(failure, state.trace_id)(scope, receive, send)
        elif state.streams:  # else the answer has begun, and closing it early is all that can be said
            event = b"data: " + orjson.dumps(failure.body(state.trace_id)) + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": False})

    def _forgive(self, state: RequestState) -> None:
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()
        if state.gone:
            state.status = CLIENT_GONE

    def _account(self, scope: Scope, state: RequestState) -> None:
        route = getattr(scope.get("route"), "path", None) or "unmatched"
        call, now = state.call, time.monotonic()
        first = call.first_token_at - state.started if call is not None and call.first_token_at else None
        facts = Facts(
            route, state.status or 500, now - state.started, state.model, state.runtime,
            call.prompt_tokens if call else 0, call.completion_tokens if call else 0, first,
        )  # fmt: skip
        self._metrics.count(facts)
        if route in QUIET_ROUTES and state.status in (200, 503):
            return
        line = {
            "trace_id": state.trace_id,
            "method": scope["method"] if scope["method"].isalpha() else "?",
            "route": route,
            "status": facts.status,
            "seconds": round(facts.seconds, 6),
            "bytes_in": state.bytes_in,
            "bytes_out": state.bytes_out,
        }
        if state.owner is not None:
            line["key"] = state.owner
        if state.failure is not None:
            line["code"] = state.failure.code
        if state.model is not None:
            line["model"] = state.model
            line["prompt_tokens"] = facts.prompt_tokens
            line["completion_tokens"] = facts.completion_tokens
            line["first_token_seconds"] = round(first, 6) if first is not None else None
        self._log.info("request", **line)


def failure_response(failure: Failure, trace_id: str) -> Response:
    """An error object as the whole answer."""
    headers = {}
    if failure.retry_after is not None:
        headers["retry-after"] = str(failure.retry_after)
    if failure.status == 401:
        headers["www-authenticate"] = "Bearer"
    if failure.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not wanted
    return Response(orjson.dumps(failure.body(trace_id)), failure.status, headers, "application/json")
