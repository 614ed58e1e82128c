"""A server that speaks HTTP by hand, so that it can break it: each request's behaviour is chosen by its number."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

Behaviour = Callable[[int], str]
"""What to do with request number 1, 2, 3, …: "ok" or a way to fail (see FakeServer._answer)."""


def usual(_number: int) -> str:
    """Always well."""
    return "ok"


class FakeServer:
    """An OpenAI-compatible server that answers all at once, or one_at_a_time, and counts two tokens a word and ten."""

    def __init__(
        self, behaviour: Behaviour = usual, *, tokens: int = 4, token_seconds: float = 0.0, usage: bool = True,
        one_at_a_time: bool = False, strict: bool = False,
    ) -> None:  # fmt: skip
        self.behaviour, self.tokens, self.token_seconds, self.usage = behaviour, tokens, token_seconds, usage
        self.strict = strict
        self.requests = 0
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.port = 0
        self._one_at_a_time = one_at_a_time

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while await self._one(reader, writer):
                    pass
        finally:
            writer.transport.abort()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lengths = [line[15:] for line in head.split("\r\n") if line.lower().startswith("content-length:")]
        body = json.loads(await reader.readexactly(int(lengths[0])) if lengths else b"{}")
        self.headers.append(head)
        return await self._route(head.split()[1], body, writer)

    async def _route(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        if path.endswith("/models"):
            return await _json(writer, {"data": [{"id": "fake/model-1"}]})
        words = sum(len(item["content"].split()) for item in body.get("messages", [])) or len(body["message"].split())
        usage = {"prompt_tokens": 10 + 2 * words, "completion_tokens": self.tokens}
        if body.get("stream_options") and self.strict:
            return await _json(writer, {"error": {"message": "unknown field stream_options"}}, status=400)
        if body.get("stream") and body["max_tokens"] == 1:  # what the server can do is found out this way
            return await self._stream("ok", usage, writer)
        if body["max_tokens"] == 1:
            answer = {"answer": "w"} if path.endswith("/chat") else {"choices": [{"message": {"content": "w"}}]}
            return await _json(writer, {**answer, **({"usage": usage} if self.usage else {})})
        self.requests += 1
        self.bodies.append(body)
        async with self._lock if self._one_at_a_time else contextlib.AsyncExitStack():
            return await self._answer(self.behaviour(self.requests), path, usage, writer)

    async def _answer(self, how: str, path: str, usage: dict[str, int], writer: asyncio.StreamWriter) -> bool:
        if how == "drop":
            writer.transport.abort()
            return False
        if how == "leave":
            self._server.close()
        if how == "hang":
            await asyncio.sleep(30)
            return False
        if how.isdigit():
            return await _json(writer, {"error": {"message": "no"}}, status=int(how))
        if how == "html":
            return await _json(writer, None, text="<html>busy</html>", kind="text/html")
        if path.endswith("/chat"):
            await asyncio.sleep(self.token_seconds * self.tokens)
            return await _json(writer, {"answer": "w " * self.tokens, "usage": usage, "trace_id": "t"})
        return await self._stream(how, usage, writer) and how != "leave"

    async def _stream(self, how: str, usage: dict[str, int], writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        _event(writer, _chunk({"role": "assistant"}))
        for number in range(self.tokens):
            await asyncio.sleep(self.token_seconds)
            _event(writer, _chunk({how if how in ("reasoning", "tool_calls") else "content": "w "}))
            await writer.drain()
            if number == 1 and how in ("stall", "pings"):
                for _ in range(300):
                    await asyncio.sleep(0.1)
                    if how == "pings":
                        _raw(writer, b": ping\n\n")
                        await writer.drain()
            if number == 1 and how == "cut":
                writer.transport.abort()
                return False
            if number == 1 and how == "garbage":
                _raw(writer, b"data: {not json\n\n")
            if number == 1 and how == "list":
                _raw(writer, b"data: [1, 2]\n\n")
            if number == 1 and how == "no choices":
                _raw(writer, b'data: {"object": "other"}\n\n')
            if number == 1 and how == "error event":
                _raw(writer, b'data: {"error": {"message": "out of memory"}}\n\n')
        if how != "unfinished":
            _event(writer, _chunk({}, "stop"))
        if self.usage:
            _event(writer, {"choices": [], "usage": usage})
        _raw(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    def run(self, started: threading.Event, over: threading.Event) -> None:
        """Serve until told to stop."""

        async def main() -> None:
            self._lock = asyncio.Lock()
            self._server = server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            started.set()
            while not over.is_set():
                await asyncio.sleep(0.02)
            server.close()
            connections = asyncio.all_tasks() - {asyncio.current_task()}
            for task in connections:
                task.cancel()
            await asyncio.gather(*connections, return_exceptions=True)
            await asyncio.sleep(0)  # lets the aborted transports close their sockets

        asyncio.run(main())


@contextlib.contextmanager
def serving(server: FakeServer) -> Iterator[FakeServer]:
    """Run a server in a thread."""
    started, over = threading.Event(), threading.Event()
    thread = threading.Thread(target=server.run, args=(started, over))
    thread.start()
    try:
        assert started.wait(10)
        yield server
    finally:
        over.set()
        thread.join()


def _chunk(delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def _event(writer: asyncio.StreamWriter, data: dict[str, Any]) -> None:
    _raw(writer, f"data: {json.dumps(data)}\n\n".encode())


def _raw(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


async def _json(
    writer: asyncio.StreamWriter,
    data: Any,
    *,
    status: int = 200,
    text: str | None = None,
    kind: str = "application/json",
) -> bool:  # fmt: skip
    body = (text if text is not None else json.dumps(data)).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\nserver: fake/1.0\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    return True
