"""A proxy on loopback before a registry: remembers every request, and does to some of them what a rule says."""

from __future__ import annotations

import http.client
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass(frozen=True)
class Asked:
    """One request; number: its place in the row of all."""

    number: int
    method: str
    path: str
    headers: Mapping[str, str]
    size: int

    @property
    def sends(self) -> bool:
        """Whether it carries some of a blob or manifest."""
        return self.method in ("PUT", "PATCH") and self.size > 0

    @property
    def sends_blob(self) -> bool:
        return self.sends and "/blobs/" in self.path


@dataclass(frozen=True)
class Answer:
    """What goes back: status, headers, body. short: end the connection before the last so many bytes of the body."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    short: int = 0


Forward = Callable[[], Answer]
Rule = Callable[[Asked, Forward], Answer | None]
"""None drops the connection."""


class Proxy:
    """Listens until closed. rule: may be changed at any time."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self.asked: list[Asked] = []
        self.rule: Rule = lambda _, forward: forward()
        self._count = itertools.count(1)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _any(self) -> None:
                proxy._handle(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = _any  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # a client that gave up

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def since(self, number: int) -> list[Asked]:
        """What was asked after the first `number` requests."""
        return self.asked[number:]

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = _body(handler)
        headers = dict(handler.headers.items())
        asked = Asked(next(self._count), handler.command, handler.path, headers, len(body))
        self.asked.append(asked)
        answer = self.rule(asked, lambda: self._forward(asked, body))
        if answer is None:
            handler.close_connection = True
            return
        handler.send_response(answer.status)
        for name, value in answer.headers:
            handler.send_header(name, value)
        if asked.method != "HEAD":
            handler.send_header("Content-Length", str(len(answer.body)))
        handler.end_headers()
        if asked.method != "HEAD":
            handler.wfile.write(answer.body[: len(answer.body) - answer.short])
        if answer.short:
            handler.close_connection = True

    def _forward(self, asked: Asked, body: bytes) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self._upstream, timeout=30)
        try:
            headers = {key: value for key, value in asked.headers.items() if key.lower() not in HOP_BY_HOP}
            connection.request(
                asked.method, asked.path, body=body, headers={**headers, "Content-Length": str(len(body))}
            )
            response = connection.getresponse()
            data = response.read()
            kept = [
                (key, value)
                for key, value in response.getheaders()
                if key.lower() not in HOP_BY_HOP or (asked.method == "HEAD" and key.lower() == "content-length")
            ]
            return Answer(response.status, tuple(kept), data)
        except OSError:
            return Answer(502)
        finally:
            connection.close()


def _body(handler: BaseHTTPRequestHandler) -> bytes:
    if handler.headers.get("Transfer-Encoding", "") != "chunked":
        return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    data = b""
    while size := int(handler.rfile.readline(), 16):
        data += handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()
    return data


@contextmanager
def proxy_before(port: int) -> Iterator[Proxy]:
    """A proxy until the block ends."""
    proxy = Proxy(port)
    try:
        yield proxy
    finally:
        proxy.close()
