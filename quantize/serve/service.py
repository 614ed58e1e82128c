"""One request from model name to answer: who may try, a slot, the time it has, and who tries next.

In: a Call and a model name. Out: a whole answer, or a Live stream whose first event is there already. Raises Failure.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from quantize.serve.engines.base import Call, Engine
from quantize.serve.failures import Failure, timed_out
from quantize.serve.limits import Slots
from quantize.serve.logs import Log
from quantize.serve.monitoring import Metrics
from quantize.serve.router import Router

Result = TypeVar("Result")


@dataclass(frozen=True)
class RequestLimits:
    """What a request may have. Seconds, tokens, bytes; None: as much as the model allows."""

    max_body_bytes: int = 4 << 20
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    timeout_seconds: float = 120.0
    body_seconds: float = 15.0
    requests_per_minute: int = 0
    concurrency: int = 2
    queue: int = 16


class Live:
    """A stream under way: holds its slot until it is closed."""

    def __init__(self, engine: Engine, slots: Slots, events: AsyncGenerator[bytes], deadline: float) -> None:
        self.engine = engine
        self.deadline = deadline
        self._slots = slots
        self._events = events
        self._started = time.monotonic()
        self._first: bytes | None = None
        self._open = True

    async def wait_for_first(self) -> None:
        """Until the first event is there: before it, another model may still answer."""
        self._first = await anext(self._events, None)

    async def events(self) -> AsyncGenerator[bytes]:
        """All events."""
        if self._first is not None:
            yield self._first
        async for event in self._events:
            yield event

    async def close(self) -> None:
        """Stop the model, if it is not done, and give the slot back."""
        if self._open:
            self._open = False
            try:
                await self._events.aclose()
            finally:
                self._slots.release(time.monotonic() - self._started)


class Service:
    """Engines behind limits."""

    def __init__(
        self, router: Router, limits: RequestLimits, slots: Mapping[str, Slots], metrics: Metrics, log: Log
    ) -> None:  # fmt: skip
        self.router = router
        self.limits = limits
        self.slots = slots
        self.metrics = metrics
        self._log = log

    async def complete(self, call: Call) -> tuple[dict[str, Any], Engine]:
        """The whole answer, and who gave it."""

        async def attempt(engine: Engine) -> tuple[dict[str, Any], Engine]:
            slots = self.slots[engine.name]
            async with asyncio.timeout(self.limits.timeout_seconds):
                await slots.acquire()
                started = time.monotonic()
                try:
                    return await engine.complete(call), engine
                finally:
                    slots.release(time.monotonic() - started)

        return await self._with_fallback(call, attempt)

    async def open_stream(self, call: Call) -> Live:
        """A stream with its first event; who calls closes it."""

        async def attempt(engine: Engine) -> Live:
            slots = self.slots[engine.name]
            async with asyncio.timeout(self.limits.timeout_seconds) as limit:
                await slots.acquire()
                live = Live(engine, slots, engine.stream(call), limit.when() or 0.0)
                try:
                    await live.wait_for_first()
                except BaseException:
                    await live.close()
                    raise
            return live

        return await self._with_fallback(call, attempt)

    async def _with_fallback(self, call: Call, attempt: Callable[[Engine], Awaitable[Result]]) -> Result:
        candidates = self.router.candidates(call.request.model, call.trace_id)
        for index, engine in enumerate(candidates):
            try:
                return await self._attempt(engine, attempt)
            except Failure as exc:
                if not exc.elsewhere or index == len(candidates) - 1:
                    raise
                by = candidates[index + 1].name
                self.metrics.fallbacks.labels(engine.name, by).inc()
                self._log.warning("fallback", trace_id=call.trace_id, model=engine.name, by=by, code=exc.code)
                call.prompt_tokens = call.completion_tokens = 0
                call.first_token_at = None
        raise AssertionError("there is at least one candidate")

    async def _attempt(self, engine: Engine, attempt: Callable[[Engine], Awaitable[Result]]) -> Result:
        try:
            return await attempt(engine)
        except TimeoutError:
            raise timed_out(self.limits.timeout_seconds) from None


async def relay(
    live: Live, call: Call, write: Callable[[bytes], Awaitable[None]], limits: RequestLimits
) -> Failure | None:
    """Write a stream's events until its end or its deadline. What goes wrong on the way becomes an event of its own."""
    try:
        async with asyncio.timeout_at(live.deadline), aclosing(live.events()) as events:
            async for event in events:
                await write(event)
        return None
    except TimeoutError:
        failure = timed_out(limits.timeout_seconds)
    except Failure as exc:
        failure = exc
    finally:
        await live.close()
    import orjson

    await write(b"data: " + orjson.dumps(failure.body(call.trace_id)) + b"\n\n")
    return failure
