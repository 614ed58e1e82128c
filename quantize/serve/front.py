"""What a request meets first: a proxy's path prefix, HEAD, other origins' pages. Plain ASGI, before keys are read.

In: every request, as it was sent. Out: the path that routes have, so that what is protected and what is routed are one
and the same; and for origins that were allowed, the headers that let a browser read the answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from quantize.errors import UsageError
from quantize.serve.edge import App, Message, Receive, Scope, Send

PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")
ORIGIN = re.compile(r"https?://[A-Za-z0-9.\[\]:-]+", re.IGNORECASE)
OWN = frozenset({"v1", "chat", "health", "ready", "metrics", "docs", "assets", "openapi.json", "favicon.ico"})
HEADER_NAMES = re.compile(rb"[A-Za-z0-9_, -]{1,2000}")
EXPOSED = b"x-request-id, retry-after"
PREFLIGHT_SECONDS = b"600"


@dataclass(frozen=True)
class Front:
    """root_path: what a proxy has before our paths, "" or /like/this. origins: whose pages may ask; "*" is any."""

    root_path: str = ""
    origins: tuple[str, ...] = ()

    @classmethod
    def of(cls, root_path: str, origins: tuple[str, ...]) -> Front:
        """From the words of a command. Raises UsageError."""
        prefix = root_path.rstrip("/")
        if prefix and (not PREFIX.fullmatch(prefix) or prefix.split("/")[1] in OWN or ".." in prefix):
            hint = "such as /llm: letters, digits and -._~, and not what begins one of the gateway's own paths"
            raise UsageError(f"--root-path {root_path!r}: not a prefix that can be used", hint=hint)
        for origin in origins:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                hint = "such as https://chat.example.com or http://localhost:3000, without a path; * is any"
                raise UsageError(f"--cors {origin!r}: not an origin", hint=hint)
        return cls(prefix, tuple(origin.lower() for origin in origins))


class FrontApp:
    """Wraps the edge."""

    def __init__(self, app: App, front: Front) -> None:
        self._app = app
        self._root = front.root_path
        self._origins = frozenset(origin.encode() for origin in front.origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = scope["method"]
        scope = {**scope, "path": self._path(scope["path"]), "method": "GET" if asked == "HEAD" else asked}
        if self._origins:
            headers = dict(scope["headers"])
            allowed = self._allowed(headers.get(b"origin", b""))
            if allowed and asked == "OPTIONS" and b"access-control-request-method" in headers:
                await _preflight(headers, allowed, send)
                return
            send = _opened(send, allowed)
        await self._app(scope, receive, send)

    def _path(self, path: str) -> str:
        """Without the prefix, whether the proxy took it away or not, and without a slash at the end."""
        if self._root and (path == self._root or path.startswith(self._root + "/")):
            path = path[len(self._root) :]
        return path.rstrip("/") or "/"

    def _allowed(self, origin: bytes) -> bytes:
        if not origin or b"*" in self._origins:
            return origin and b"*"
        return origin if origin.lower() in self._origins else b""


async def _preflight(headers: dict[bytes, bytes], allowed: bytes, send: Send) -> None:
    """The answer to a browser that asks before it asks."""
    names = headers.get(b"access-control-request-headers", b"")
    answer = [
        (b"access-control-allow-origin", allowed),
        (b"access-control-allow-methods", b"GET, HEAD, POST"),
        (b"access-control-allow-headers", names if HEADER_NAMES.fullmatch(names) else b"authorization, content-type"),
        (b"access-control-max-age", PREFLIGHT_SECONDS),
        (b"vary", b"origin, access-control-request-headers"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": answer})
    await send({"type": "http.response.body", "body": b""})


def _opened(send: Send, allowed: bytes) -> Send:
    """Sends answers that the page of an allowed origin may read."""
    extra = [(b"vary", b"origin")]
    if allowed:
        extra += [(b"access-control-allow-origin", allowed), (b"access-control-expose-headers", EXPOSED)]

    async def opened(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *extra]
        await send(message)

    return opened
