"""An OpenAI-compatible server as an Engine: vLLM, Ollama, llama-server. Its events go through as they are.

In: a Call. Out: what the server says, under the name that the gateway gives it. Only the events with usage are parsed.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import aiohttp
import orjson

from quantize.serve.engines.base import Call, EngineState, Status
from quantize.serve.engines.link import Listener
from quantize.serve.failures import Failure, not_ready
from quantize.serve.targets import UpstreamTarget

POLL_SECONDS = 0.75
POLL_TIMEOUT_SECONDS = 10.0  # a server that asks others for its list takes its time
CONNECT_SECONDS = 5.0
KEEP_ALIVE_SECONDS = 4.0  # less than uvicorn's 5: who closes first must be the client
EVENT_BYTES = 16 << 20
PASSED_ON = frozenset({400, 404, 413, 422, 429})
NOT_TOLD = frozenset({401, 403})  # such answers may repeat the key
REASON_CHARACTERS = 2000
DONE = b"data: [DONE]"
NO_LIST = frozenset({404, 405, 501})  # statuses of a server that answers, and has no /models
MODEL = re.compile(rb'^(data:[^\n]*?"model"\s*:\s*)"(?:[^"\\]|\\.)*"', re.MULTILINE)
FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')
TOKEN = re.compile(rb'"(?:content|text|reasoning|reasoning_content|refusal|arguments)"\s*:\s*"[^"]')


class UpstreamEngine:
    """See Engine."""

    def __init__(self, upstream: UpstreamTarget, tell: Listener) -> None:
        self.name = upstream.name
        self.runtime = f"upstream {upstream.host}"
        self.status = Status(EngineState.LOADING, 0, "not asked yet")
        self._upstream = upstream
        self._base = upstream.url.rstrip("/")
        self._model = upstream.model
        self._tell = tell
        self._session: aiohttp.ClientSession | None = None
        self._poll: asyncio.Task[None] | None = None
        self._renamed = rb"\g<1>" + orjson.dumps(upstream.name).replace(b"\\", b"\\\\")
        self._asking = 0  # answers under way
        self._heard = 0.0  # when the last one ended

    async def start(self) -> None:
        """See Engine."""
        headers = {"Accept-Encoding": "identity"}  # what is compressed all the same is decoded
        if self._upstream.key:
            headers["Authorization"] = f"Bearer {self._upstream.key}"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=headers, read_bufsize=1 << 18
        )
        self._poll = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """See Engine."""
        self.status = Status(EngineState.STOPPED, 0, "the gateway is stopping")
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
        wanted = "data" if call.path == "/embeddings" else "choices"
        if not isinstance(answer, dict) or not isinstance(answer.get(wanted), list):
            _raise_error(answer)
            raise Failure(502, "upstream_invalid", "the upstream's answer is no completion", elsewhere=True)
        call.saw_token()
        self._count(call, answer)
        return {**answer, "model": self.name, "trace_id": call.trace_id}

    async def stream(self, call: Call) -> AsyncGenerator[bytes]:
        """See Engine. Whole events only: an event that breaks off is not sent on."""
        rest, finished, done = b"", False, False
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
                if end < 2:
                    rest = data
                    continue
                rest = data[end:]
                ready = data[:end]
                finished = finished or FINISHED.search(ready) is not None
                done = done or DONE in ready
                for part in self._pass_on(call, ready):
                    yield part
        if _is_whole(rest):  # the last event, without the empty line that ends one
            finished = finished or FINISHED.search(rest) is not None
            done = done or DONE in rest
            for part in self._pass_on(call, rest.strip() + b"\n\n"):
                yield part
        if not done and finished:
            yield DONE + b"\n\n"
        elif not done:
            _raise_error(_json(rest))
            raise Failure(502, "upstream_broke_off", "the upstream's answer broke off", elsewhere=True)

    def _pass_on(self, call: Call, events: bytes) -> Iterator[bytes]:
        """The events as they go on: renamed, counted, without usage that the client did not ask for.

        Raises Failure where one of them is an error; what comes before it is given first.
        """
        if call.first_token_at is None and TOKEN.search(events):
            call.saw_token()
        if b'"error"' in events:
            before, failure = _split_at_error(events)
            if failure is not None:
                if before:
                    yield from self._pass_on(call, before)
                raise failure
        events = self._without_usage(call, MODEL.sub(self._renamed, events))
        if events:
            yield events

    def _without_usage(self, call: Call, events: bytes) -> bytes:
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
            call.prompt_tokens = _number(usage.get("prompt_tokens"))
            call.completion_tokens = _number(usage.get("completion_tokens"))

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
            away = EngineState.RESTARTING if self.status.details else EngineState.LOADING
            state = away if reason else EngineState.READY
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
                if response.status in NO_LIST and self._model is not None:
                    return ""
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
        if self._model is None or (models and not _names(self._model, models)):
            return f"{self._upstream.host} has no model {self._model or 'at all'}"
        return ""


def _json(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return None


def _refused(status: int, body: bytes, headers: Any) -> Failure:
    """The upstream's own refusal where it is about the request; else 502, and another model may try."""
    message = _reason(_json(body))
    if status not in PASSED_ON:
        told = f": {message}" if message and status not in NOT_TOLD else ""
        return Failure(502, "upstream_error", f"the upstream answered {status}{told}", elsewhere=True)
    wait = str(headers.get("Retry-After", ""))
    return Failure(
        status, "upstream_refused", message or f"the upstream answered {status}",
        retry_after=(int(wait) if wait.isdigit() else 1) if status == 429 else None,
    )  # fmt: skip


def _reason(answer: Any) -> str | None:
    """The reason in an error body of OpenAI's, vLLM's, FastAPI's or Ollama's shape."""
    if not isinstance(answer, dict):
        return None
    found = answer.get("error") or answer.get("message") or answer.get("detail")
    if isinstance(found, dict):
        found = found.get("message") or found.get("detail")
    if isinstance(found, list) and found and isinstance(found[0], dict):
        where = ".".join(map(str, loc)) if isinstance(loc := found[0].get("loc"), list) else ""
        found = f"{where}: {found[0].get('msg')}" if where else found[0].get("msg")
    return found[:REASON_CHARACTERS] if isinstance(found, str) and found else None


def _raise_error(answer: Any) -> None:
    """Raises the Failure for an error that came with status 200."""
    if not isinstance(answer, dict) or not (answer.get("error") or answer.get("object") == "error"):
        return
    error = answer["error"] if isinstance(answer.get("error"), dict) else answer
    given = [error.get(key) for key in ("status", "code")]
    status = next((value for value in given if isinstance(value, int) and value in PASSED_ON), None)
    message = _reason(answer) or "the upstream says that it failed, not why"
    if status is None:
        raise Failure(502, "upstream_error", f"the upstream failed: {message}", elsewhere=True)
    raise Failure(status, "upstream_refused", message, retry_after=1 if status == 429 else None)


def _split_at_error(events: bytes) -> tuple[bytes, Failure | None]:
    """What comes before an event that is an error, and the error."""
    before: list[bytes] = []
    for event in events.split(b"\n\n"):
        if b'"error"' in event:
            try:
                _raise_error(_json(b"".join(line[5:] for line in event.split(b"\n") if line.startswith(b"data:"))))
            except Failure as failure:
                return b"".join(item + b"\n\n" for item in before), failure
        before.append(event)
    return events, None


def _is_whole(rest: bytes) -> bool:
    """Whether the end of a stream is an event that only lacks its empty line."""
    text = rest.strip()
    return text.startswith(b"data:") and (text.endswith(b"[DONE]") or isinstance(_json(text[5:]), dict))


def _names(model: str, listed: list[Any]) -> bool:
    """Whether a server that lists these knows the model; Ollama's `name` is its `name:latest`."""
    return model in listed or (":" not in model.rpartition("/")[2] and f"{model}:latest" in listed)


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


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
