"""The application: engines, limits, routes, the page and the documentation, wired.

In: engines by name, rules, limits, keys, a log. Out: an ASGI application whose lifespan starts and stops the engines.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from quantize import __version__
from quantize.serve import protocol
from quantize.serve.edge import CLIENT_GONE, INTERNAL, STATE, App, Edge, RequestState, failure_response
from quantize.serve.engines.base import Engine
from quantize.serve.failures import ClientGone, Failure
from quantize.serve.front import Front, FrontApp
from quantize.serve.limits import Keys, Rates, Slots
from quantize.serve.logs import Log
from quantize.serve.monitoring import Metrics, Watcher
from quantize.serve.page import add_pages
from quantize.serve.router import Router, Rules
from quantize.serve.routes import make_router
from quantize.serve.service import RequestLimits, Service

BODIES = (
    protocol.ChatRequest,
    protocol.CompletionRequest,
    protocol.EmbeddingRequest,
    protocol.SimpleChatRequest,
    protocol.GenerateRequest,
)
DIRECT = Front()


@dataclass(frozen=True)
class Gateway:
    """The application and what it is made of."""

    app: App
    service: Service
    edge: Edge
    log: Log


def make_gateway(
    make_engines: Callable[[Watcher], Mapping[str, Engine]], rules: Rules, limits: RequestLimits, keys: Keys, log: Log,
    front: Front = DIRECT,
) -> Gateway:  # fmt: skip
    """The whole gateway; engines are made with what listens to them. Raises UsageError: rules name an unknown model."""
    metrics = Metrics()
    engines = make_engines(Watcher(log, metrics))
    slots = {name: Slots(limits.concurrency, limits.queue) for name in engines}
    metrics.follow(engines, slots)
    service = Service(Router(engines, rules), limits, slots, metrics, log)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        for engine in engines.values():
            await engine.start()
        yield
        for engine in engines.values():
            await engine.stop()

    app = FastAPI(
        title="quantize gateway", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        redirect_slashes=False,
        exception_handlers={HTTPException: _on_http, Failure: _on_failure, ClientGone: _on_gone, 500: _on_http},
    )  # fmt: skip
    app.include_router(make_router(service, time.monotonic()))
    add_pages(app, front.root_path)
    _describe_bodies(app, front.root_path, needs_key=bool(keys))
    edge = Edge(cast("App", app), keys, Rates(limits.requests_per_minute), metrics, log)
    return Gateway(FrontApp(edge, front), service, edge, log)


async def _on_failure(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, Failure)
    state: RequestState = request.scope[STATE]
    state.failure = exc
    return failure_response(exc, state.trace_id)


async def _on_http(request: Request, exc: Exception) -> Response:
    """The inner router's own errors, in the shape of all others."""
    status = exc.status_code if isinstance(exc, HTTPException) else 500
    words = {404: ("not_found", "no such path; see /docs"), 405: ("method_not_allowed", "not with this method")}
    response = await _on_failure(request, Failure(status, *words.get(status, INTERNAL)))
    response.headers.update((isinstance(exc, HTTPException) and exc.headers) or {})
    return response


async def _on_gone(_request: Request, _exc: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


def _describe_bodies(app: FastAPI, root_path: str, *, needs_key: bool) -> None:
    """Add the schemas of bodies that routes read themselves, and how keys are sent."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = made()
            if root_path:
                schema["servers"] = [{"url": root_path}]
            parts = schema.setdefault("components", {}).setdefault("schemas", {})
            for body in BODIES:
                own = body.model_json_schema(ref_template="#/components/schemas/{model}")
                parts.update(own.pop("$defs", {}))
                parts[body.__name__] = own
            if needs_key:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                for path, operations in schema["paths"].items():
                    if path.startswith("/v1/") or path == "/chat":
                        for operation in operations.values():
                            operation["security"] = [{"key": []}]
        return cast("dict[str, Any]", app.openapi_schema)

    app.openapi = openapi  # type: ignore[method-assign]
