"""HTTP/1.1 on one connection: uvicorn's protocol, with limits before a request is a request.

In: bytes. Out: requests for the application, or a refusal that says why: 400, 408, 414, 431. What is waited for is told
to the door, which has the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from quantize.serve.door import Door, Stage
from quantize.serve.edge import failure_response
from quantize.serve.failures import Failure

LINGER_SECONDS = 1.0  # what is refused in the middle of sending may never see why, if it is cut off at once

NOT_HTTP = Failure(400, "invalid_http", "this is not HTTP/1.1")
TOO_SLOW = {
    Stage.HEAD: Failure(408, "head_too_slow", "no whole request head in time"),
    Stage.BODY: Failure(408, "body_too_slow", "no whole body in time"),
}


class Wire(HttpToolsProtocol):
    """One connection. See uvicorn; a Guest of the door."""

    def __init__(self, door: Door, **given: Any) -> None:
        super().__init__(**given)
        self._door = door
        self._stage: Stage | None = None
        self._in_head = self._in_body = False
        self._head_bytes = self._counted = 0
        self._refusal: Failure | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        super().connection_made(transport)
        self._stage = Stage.SILENT
        self._door.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        super().connection_lost(exc)
        self._door.leave(self, self._stage)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self._refusal is not None:
            return  # it is told already
        self._unset_keepalive_if_required()
        if not self._in_body:
            self._in_head = True
            self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
            if self._in_head and self._head_bytes > self._door.limits.head_bytes:
                self._too_large(431, "head_too_large", self._door.limits.head_bytes)
        except httptools.HttpParserUpgrade:
            pass  # to nothing that is there: the request is answered as it is
        except httptools.HttpParserError:
            self._refuse(self._refusal or NOT_HTTP)
            return
        self._settle()

    def on_message_begin(self) -> None:
        """See httptools: one request after the other may be in the same bytes."""
        super().on_message_begin()
        self._in_head, self._in_body, self._counted = True, False, 0

    def on_url(self, url: bytes) -> None:
        """See httptools."""
        super().on_url(url)
        if len(self.url) > self._door.limits.url_bytes:
            self._too_large(414, "url_too_long", self._door.limits.url_bytes)

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools: also of headers after a body."""
        super().on_header(name, value)
        self._counted += len(name) + len(value)
        if self._counted > self._door.limits.head_bytes or len(self.headers) > self._door.limits.headers:
            self._too_large(431, "head_too_large", self._door.limits.head_bytes)

    def on_headers_complete(self) -> None:
        """See httptools."""
        super().on_headers_complete()
        self._in_head, self._in_body = False, True

    def on_message_complete(self) -> None:
        """See httptools."""
        super().on_message_complete()
        self._in_body = False
        self._head_bytes = 0

    def on_response_complete(self) -> None:
        """See uvicorn."""
        super().on_response_complete()
        self._settle()

    def too_slow(self, stage: Stage) -> None:
        """See Guest."""
        self._stage = None
        failure = TOO_SLOW.get(stage)
        if failure is None or (stage is Stage.BODY and self.cycle.response_started):
            self.make_way()  # nothing was asked, or it is answered already
        else:
            self._refuse(failure)

    def make_way(self) -> None:
        """See Guest."""
        self._stage = None
        self.transport.abort()

    def _settle(self) -> None:
        """Tell the door what is waited for now."""
        cycle = self.cycle
        stage: Stage | None
        if cycle is not None and not cycle.response_complete and (self.pipeline or not cycle.more_body):
            stage = None
        elif self._in_body:
            stage = Stage.BODY
        else:
            stage = Stage.HEAD if self._in_head else Stage.SILENT
        if stage is not self._stage and self._refusal is None and not self.transport.is_closing():
            self._door.place(self, self._stage, stage)
            self._stage = stage

    def _too_large(self, status: int, code: str, most: int) -> None:
        """Stop the parser. Its own error is not told: ours is."""
        what = "address" if status == 414 else "request head"
        self._refusal = Failure(status, code, f"the {what} has more than {most} bytes, or too many headers")
        raise httptools.HttpParserError(code)

    def _refuse(self, failure: Failure) -> None:
        self._refusal = failure
        self._door.refused(failure.code.replace("_", " "))
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started:
                self.make_way()  # in the middle of an answer there is no place to say it
                return
            cycle.disconnected = True  # what the application still has to say is not sent
            cycle.message_event.set()
        trace_id = uuid.uuid4().hex
        response = failure_response(failure, trace_id)
        lines = [STATUS_LINE[failure.status], *(name + b": " + value + b"\r\n" for name, value in response.raw_headers)]
        close = [] if b"connection" in dict(response.raw_headers) else [b"connection: close\r\n"]
        lines += [*close, b"x-request-id: " + trace_id.encode() + b"\r\n\r\n", bytes(response.body)]
        self.transport.write(b"".join(lines))
        self._door.place(self, self._stage, Stage.SILENT)
        self._stage = Stage.SILENT
        self.loop.call_later(LINGER_SECONDS, self._end)

    def _end(self) -> None:
        with contextlib.suppress(RuntimeError):
            self.transport.abort()
