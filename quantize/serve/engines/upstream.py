"""An OpenAI-compatible server as an Engine: vLLM, Ollama, llama-server. Its events go through as they are.

In: a Call. Out: what the server says, under the name that the gateway gives it. Only the events with usage are parsed.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator
from typing import Any

import aiohttp
import orjson

from quantize.serve.engines.base import Call, Status
from quantize.serve.engines.link import Listener
from quantize.serve.failures import Failure, not_ready
from quantize.serve.targets import UpstreamTarget

POLL_SECONDS = 0.75
POLL_TIMEOUT_SECONDS = 1.0
CONNECT_SECONDS = 5.0
KEEP_ALIVE_SECONDS = 4.0  # less than uvicorn's 5: who closes first must be the client
EVENT_BYTES = 16 << 20
PASSED_ON = frozenset({400, 404, 413, 422, 429})
DONE = b"[DONE]"


class UpstreamEngine:
    """See Engine."""

    def __init__(self, upstream: UpstreamTarget, tell: Listener) -> None:
        self.name = upstream.name
        self.runtime = f"upstream {upstream.host}"
        self.status = Status("loading", 0, "not asked yet")
        self._upstream = upstream
        self._base = upstream.url.rstrip("/")
        self._model = upstream.model
        self._tell = tell
        self._session: aiohttp.ClientSession | None = None
        self._poll: asyncio.Task[None] | None = None
        self._rename: re.Pattern[bytes] | None = None
        self._asking = 0  # answers under way
        self._heard = 0.0  # when the last one ended

    async def start(self) -> None:
        """See Engine."""
        headers = {"Authorization": f"Bearer {self._upstream.key}"} if self._upstream.key else {}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=headers, auto_decompress=False, read_bufsize=1 << 18
        )
        self._poll = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """See Engine."""
        self.status = Status("stopped", 0, "the gateway is stopping")
        if self._poll is not None:
            self._poll.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._poll
        if self._session is not None:
            await self._session.close()

    def memory_bytes(self) -> int:
        """See Engine: it is not our process."""
        return 0

    async def complete(self, call: Call) -> dict[str, Any]:
        """See Engine."""
        async with contextlib.aclosing(self._post(call)) as chunks:
            body = b"".join([chunk async for chunk in chunks])
        answer = _json(body)
        if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
            raise Failure(502, "upstream_invalid", "the upstream's answer is no completion", elsewhere=True)
        call.saw_token()
        self._count(call, answer)
        return {**answer, "model": self.name, "trace_id": call.trace_id}

    async def stream(self, call: Call) -> AsyncGenerator[bytes]:
        """See Engine. Whole events only: an event that breaks off is not sent on."""
        rest, done = b"", False
        async with contextlib.aclosing(self._post(call)) as chunks:
            async for chunk in chunks:
                data = rest + chunk if rest else chunk
                end = data.rfind(b"\n\n") + 2
                if end < 2:
                    if b"\r\n\r\n" in data:
                        data = data.replace(b"\r\n", b"\n")
                        end = data.rfind(b"\n\n") + 2
                    elif len(data) > EVENT_BYTES:
                        raise Failure(502, "upstream_invalid", "an event of the upstream is too long")
                rest = data[end:]
                if end < 2:
                    continue
                ready = self._pass_on(call, data[:end])
                done = done or DONE in ready
                if ready:
                    yield ready
        if not done:
            raise Failure(502, "upstream_broke_off", "the upstream's answer broke off", elsewhere=True)

    def _pass_on(self, call: Call, events: bytes) -> bytes:
        """The events as they go on: renamed, counted, without usage that the client did not ask for."""
        call.saw_token()
        if self._rename is not None:
            events = self._rename.sub(b'"model":' + orjson.dumps(self.name), events)
        if b'"usage"' not in events:
            return events
        kept = []
        for event in events.split(b"\n\n"):
            data = _json(event[5:]) if b'"usage"' in event and event.startswith(b"data:") else None
            if isinstance(data, dict):
                self._count(call, data)
                if data.get("usage") and not data.get("choices") and not call.wants_usage:
                    continue
            kept.append(event)
        return b"\n\n".join(kept)

    def _count(self, call: Call, answer: dict[str, Any]) -> None:
        usage = answer.get("usage")
        if isinstance(usage, dict):
            call.prompt_tokens = int(usage.get("prompt_tokens") or 0)
            call.completion_tokens = int(usage.get("completion_tokens") or 0)

    async def _post(self, call: Call) -> AsyncGenerator[bytes]:
        """The bytes of the upstream's answer. Raises Failure for anything but success."""
        if not self.status.ready or self._session is None:
            raise not_ready(self.name, self.status.reason)
        await self._check_input(call)
        self._asking += 1
        try:
            async with self._session.post(
                self._base + call.path, data=self._payload(call), headers={"Content-Type": "application/json"}
            ) as response:
                if response.status != 200:
                    raise _refused(response.status, await response.content.read(1 << 16), response.headers)
                async for chunk in response.content.iter_any():
                    yield chunk
        except (aiohttp.ClientError, OSError) as exc:
            message = f"the upstream did not answer ({type(exc).__name__})"
            raise Failure(502, "upstream_unreachable", message, elsewhere=True) from exc
        finally:
            self._asking -= 1
            self._heard = time.monotonic()

    def _payload(self, call: Call) -> bytes:
        payload = orjson.loads(call.body)
        if self._model is not None:
            payload["model"] = self._model
        if payload.get("stream"):
            payload["stream_options"] = {**(payload.get("stream_options") or {}), "include_usage": True}
        limited = payload.get("max_tokens") is None and payload.get("max_completion_tokens") is None
        if limited and call.max_output_tokens is not None:
            payload["max_tokens"] = call.max_output_tokens
        return orjson.dumps(payload)

    async def _check_input(self, call: Call) -> None:
        """Count tokens with the upstream's own tokenizer. Raises Failure 413, or 502 where it has none."""
        if call.max_input_tokens is None or self._session is None:
            return
        payload = orjson.loads(call.body)
        asked = {key: payload[key] for key in ("messages", "prompt") if key in payload}
        body = {"model": self._model, **asked, "content": _texts(asked)}
        url = self._base.removesuffix("/v1") + "/tokenize"
        answer: Any = None
        with contextlib.suppress(aiohttp.ClientError, OSError):
            async with self._session.post(url, json=body) as response:
                answer = _json(await response.read()) if response.status == 200 else None
        answer = answer if isinstance(answer, dict) else {}
        count = answer.get("count", len(answer["tokens"]) if isinstance(answer.get("tokens"), list) else None)
        if not isinstance(count, int):
            raise Failure(502, "no_tokenizer", "the upstream has no /tokenize, so the input limit can't be held")
        if count > call.max_input_tokens:
            message = f"the input has {count} tokens, the limit is {call.max_input_tokens}"
            raise Failure(413, "input_too_long", message)

    async def _follow(self) -> None:
        """Ask for the upstream's models again and again; the status is what the last answer says."""
        while True:
            reason = await self._reason_not_ready()
            state = "loading" if reason and not self.status.details else ("restarting" if reason else "ready")
            details = self.status.details if reason else {"runtime": self.runtime, "model": self._model}
            was = self.status
            self.status = Status(state, 0 if reason else 100, reason, details)
            if was.ready != self.status.ready:
                self._tell("upstream_away" if reason else "upstream_ready", {"reason": reason})
            await asyncio.sleep(POLL_SECONDS)

    async def _reason_not_ready(self) -> str:
        assert self._session is not None
        limit = aiohttp.ClientTimeout(total=POLL_TIMEOUT_SECONDS)
        try:
            async with self._session.get(f"{self._base}/models", timeout=limit) as response:
                if response.status != 200:
                    return f"{self._upstream.host} answers {response.status} to /models"
                listed = _json(await response.read())
        except TimeoutError:
            # A server of one thread answers nothing else while it answers us: that is no reason to give it up.
            busy = self._asking > 0 or time.monotonic() - self._heard < POLL_SECONDS + POLL_TIMEOUT_SECONDS
            if busy and self.status.ready:
                return ""
            return f"{self._upstream.host} does not answer within {POLL_TIMEOUT_SECONDS:g} s"
        except (aiohttp.ClientError, OSError) as exc:
            return f"{self._upstream.host} does not answer ({type(exc).__name__})"
        models = [item.get("id") for item in listed.get("data") or []] if isinstance(listed, dict) else []
        if self._model is None and models and isinstance(models[0], str):
            self._model = models[0]
        if self._model is None or (models and self._model not in models):
            return f"{self._upstream.host} has no model {self._model or 'at all'}"
        if self._model != self.name and self._rename is None:
            quoted = re.escape(orjson.dumps(self._model))
            self._rename = re.compile(rb'"model"\s*:\s*' + quoted)
        return ""


def _json(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return None


def _refused(status: int, body: bytes, headers: Any) -> Failure:
    """The upstream's own refusal where it is about the request; else 502, and another model may try."""
    if status not in PASSED_ON:
        return Failure(502, "upstream_error", f"the upstream answered {status}", elsewhere=True)
    data = _json(body)
    error = data.get("error") if isinstance(data, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    wait = str(headers.get("Retry-After", ""))
    return Failure(
        status, "upstream_refused", str(message or f"the upstream answered {status}")[:2000],
        retry_after=(int(wait) if wait.isdigit() else 1) if status == 429 else None,
    )  # fmt: skip


def _texts(asked: dict[str, Any]) -> str:
    """All text of a request, for llama-server's tokenizer."""
    found: list[str] = []

    def visit(value: Any) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, list):
            for item in value:
                visit(item)
        elif isinstance(value, dict):
            visit(value.get("content", value.get("text")))

    for value in asked.values():
        visit(value)
    return "\n".join(found)
