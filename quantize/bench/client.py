"""One request, timed: an OpenAI-compatible chat over server-sent events, or a `/chat` endpoint.

In: an Endpoint, a prompt. Out: a Sample that says when the first token came, when it ended, how many tokens, or how it
failed. A failed request is a result, so nothing here raises for it.

Kinds of failure: "connect" (no connection), "dropped" (closed before an answer began), "timeout" (no token in time),
"stall" (tokens stopped coming), "status 503" (and the like), "broken stream" (the answer ended half-way), "malformed"
(not what the protocol says), "error event" (the server reported an error in the stream).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from quantize.bench.result import Api
from quantize.errors import MissingExtraError, UsageError

try:
    import httpx2
except ImportError as exc:
    raise MissingExtraError("`quantize bench`", "bench") from exc

CONNECT_SECONDS = 10.0
IDLE_SECONDS = 2.0
"""Connections unused for longer are not used again: servers close theirs after five seconds, and that would be ours."""
DETAIL_CHARACTERS = 200
TOKEN_FIELDS = (
    "content",
    "reasoning",
    "reasoning_content",
    "refusal",
    "tool_calls",
)  # of a delta: any is a first token


@dataclass(frozen=True)
class Endpoint:
    """Where to ask. root: the URL without `/chat/completions` or `/chat`; extra: further fields of the body.

    asks_usage: ask a stream for its count of tokens (`stream_options`), which not every server knows.
    """

    root: str
    api: Api
    model: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    asks_usage: bool = True

    @property
    def url(self) -> str:
        """Where prompts are posted."""
        return self.root + ("/chat/completions" if self.api == "openai" else "/chat")

    @property
    def host(self) -> str:
        """Host name, without port."""
        return urlsplit(self.root).hostname or ""

    @property
    def port(self) -> int:
        """Port, of the scheme where none is given."""
        parts = urlsplit(self.root)
        return parts.port or (443 if parts.scheme == "https" else 80)


@dataclass
class Sample:
    """One request. Times are of time.perf_counter; due: when it was meant to arrive; error: its kind, or None.

    answering: the head of an answer came. streamed: it comes in pieces. has_text: some of it is text for a reader, not
    only reasoning or calls of tools; True where nobody can tell.
    """

    due: float
    answering: bool = False
    streamed: bool = False
    has_text: bool = True
    first_token: float | None = None
    last_token: float | None = None
    ended: float = 0.0
    chunks: int = 0
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None
    detail: str = ""


class _Failed(Exception):
    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.kind, self.detail = kind, detail


def parse_endpoint(url: str, *, headers: Mapping[str, str], extra: Mapping[str, Any], model: str = "") -> Endpoint:
    """The endpoint that a URL means: `http://host:8000`, `…/v1`, `…/v1/chat/completions`, or `…/chat`.

    Raises UsageError.
    """
    try:
        parts = urlsplit(url.strip())
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid:
        raise UsageError(f"{url!r} is no URL of a server", hint="write it like http://127.0.0.1:8000")
    path = parts.path.rstrip("/")
    api: Api = "openai"
    if path.endswith("/chat/completions"):
        path = path.removesuffix("/chat/completions")
    elif path.endswith("/chat"):
        path, api = path.removesuffix("/chat"), "chat"
    elif not path.rpartition("/")[2].startswith("v1"):
        path += "/v1"
    root = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
    return Endpoint(root, api, model, dict(headers), dict(extra))


def new_client(endpoint: Endpoint, timeout: float) -> httpx2.AsyncClient:
    """A client without limits of its own on connections; proxies are not used for this machine."""
    local = endpoint.host in ("localhost", "127.0.0.1", "::1")
    return httpx2.AsyncClient(
        headers=dict(endpoint.headers),
        timeout=httpx2.Timeout(None, connect=min(CONNECT_SECONDS, timeout)),
        limits=httpx2.Limits(keepalive_expiry=IDLE_SECONDS),
        trust_env=not local,
    )


async def ask(
    client: httpx2.AsyncClient, endpoint: Endpoint, prompt: str, max_tokens: int, *, due: float, timeout: float
) -> Sample:
    """Ask once. timeout: seconds to wait for the answer to begin, and then for each further token."""
    sample = Sample(due)
    try:
        if endpoint.api == "openai":
            await _ask_openai(client, endpoint, prompt, max_tokens, sample, timeout)
        else:
            await _ask_chat(client, endpoint, prompt, max_tokens, sample, timeout)
    except _Failed as exc:
        sample.error, sample.detail = exc.kind, exc.detail[:DETAIL_CHARACTERS]
    except (httpx2.HTTPError, httpx2.StreamError, TimeoutError, OSError) as exc:
        sample.error, sample.detail = _kind(exc, sample), f"{type(exc).__name__}: {exc}"[:DETAIL_CHARACTERS]
    sample.ended = time.perf_counter()
    return sample


def body_of(endpoint: Endpoint, prompt: str, max_tokens: int, *, stream: bool) -> dict[str, Any]:
    """The JSON body of a request."""
    if endpoint.api == "chat":
        body: dict[str, Any] = {"message": prompt, "system": "", "temperature": 0.0, "max_tokens": max_tokens}
        return body | dict(endpoint.extra)
    messages = [{"role": "user", "content": prompt}]
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0.0, "stream": stream}
    if endpoint.model:
        body["model"] = endpoint.model
    if stream and endpoint.asks_usage:
        body["stream_options"] = {"include_usage": True}
    return body | dict(endpoint.extra)


async def _ask_openai(
    client: httpx2.AsyncClient, endpoint: Endpoint, prompt: str, max_tokens: int, sample: Sample, timeout: float
) -> None:
    body = body_of(endpoint, prompt, max_tokens, stream=True)
    deadline = asyncio.timeout(timeout)
    async with deadline, client.stream("POST", endpoint.url, json=body) as response:
        if response.status_code != 200:
            await response.aread()
            raise _Failed(f"status {response.status_code}", response.text)
        sample.answering = True
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "text/event-stream":
            raise _Failed("malformed", f"content type {kind!r} in place of text/event-stream")
        finished, sample.streamed, sample.has_text = False, True, False
        async for event in httpx2.EventSource(response):
            deadline.reschedule(asyncio.get_running_loop().time() + timeout)
            if event.data == "[DONE]":
                break
            finished = _take(event.data, sample) or finished
        if not finished:
            raise _Failed("broken stream", "ended without a finish_reason")


def _take(data: str, sample: Sample) -> bool:
    """Add one event to the sample; True if it ends the answer."""
    try:
        chunk = json.loads(data)
    except ValueError as exc:
        raise _Failed("malformed", f"no JSON: {data[:80]!r}") from exc
    if not isinstance(chunk, dict):
        raise _Failed("malformed", f"no object: {data[:80]!r}")
    if chunk.get("error"):
        raise _Failed("error event", str(chunk["error"]))
    usage = chunk.get("usage")
    if isinstance(usage, dict):
        _take_usage(usage, sample)
    choices = chunk.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise _Failed("malformed", f"no `choices`: {data[:80]!r}")
    finished = False
    for choice in choices:
        delta = choice.get("delta")
        if isinstance(delta, dict) and any(delta.get(field) for field in TOKEN_FIELDS):
            sample.has_text = sample.has_text or bool(delta.get("content") or delta.get("refusal"))
            sample.chunks += 1
            sample.last_token = time.perf_counter()
            sample.first_token = sample.first_token or sample.last_token
        finished = finished or bool(choice.get("finish_reason"))
    return finished


async def _ask_chat(
    client: httpx2.AsyncClient, endpoint: Endpoint, prompt: str, max_tokens: int, sample: Sample, timeout: float
) -> None:
    body = body_of(endpoint, prompt, max_tokens, stream=False)
    async with asyncio.timeout(timeout), client.stream("POST", endpoint.url, json=body) as response:
        sample.answering = True
        await response.aread()
    if response.status_code != 200:
        raise _Failed(f"status {response.status_code}", response.text)
    try:
        answer = response.json()
    except ValueError as exc:
        raise _Failed("malformed", f"no JSON: {response.text[:80]!r}") from exc
    if not isinstance(answer, dict) or not isinstance(answer.get("answer"), str):
        raise _Failed("malformed", f"no `answer`: {response.text[:80]!r}")
    usage = answer.get("usage")
    _take_usage(usage if isinstance(usage, dict) else answer, sample)


def _take_usage(usage: Mapping[str, Any], sample: Sample) -> None:
    prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens")
    sample.prompt_tokens = prompt if isinstance(prompt, int) else sample.prompt_tokens
    sample.output_tokens = output if isinstance(output, int) else sample.output_tokens


def _kind(exc: Exception, sample: Sample) -> str:
    if isinstance(exc, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.UnsupportedProtocol | httpx2.ProxyError):
        return "connect"
    if isinstance(exc, TimeoutError | httpx2.TimeoutException):
        return "timeout" if sample.first_token is None else "stall"
    if isinstance(exc, httpx2.SSEError | httpx2.DecodingError):
        return "malformed"
    return "broken stream" if sample.answering else "dropped"
