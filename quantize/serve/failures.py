"""What a request can fail with: HTTP status, OpenAI error object, and whether another model may try instead.

In: where something went wrong. Out: a Failure, raised; the edge writes it. Messages never repeat a prompt or a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantize.serve.neutral import asks_for_nothing

TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "invalid_request_error",
         405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error",
         415: "invalid_request_error", 422: "invalid_request_error", 429: "rate_limit_error",
         500: "internal_error", 502: "upstream_error", 503: "unavailable_error", 504: "timeout_error"}  # fmt: skip


class Failure(Exception):
    """An answer that is an error. elsewhere: a fallback model may be asked. retry_after: seconds, for the header."""

    def __init__(
        self, status: int, code: str, message: str, *,
        param: str | None = None, retry_after: int | None = None, elsewhere: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.elsewhere = elsewhere

    def body(self, trace_id: str) -> dict[str, Any]:
        """The OpenAI error object, and the trace id."""
        kind = TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error, "trace_id": trace_id}


class ClientGone(Exception):
    """The client closed the connection: nobody is left to answer."""


def unsupported(param: str, runtime: str, why: str = "") -> Failure:
    """An engine can't do what was asked for."""
    return Failure(422, "unsupported_parameter", f"{param} is not supported by {runtime}{why}", param=param)


def field_name(field: str) -> str:
    """How a field that a client made up is named in an answer."""
    return field[:40] if field.isidentifier() else "an unknown field"


def refuse_unknown(extra: Mapping[str, Any] | None, runtime: str) -> None:
    """Raise Failure for a field that no engine here knows, unless it asks for nothing."""
    for field, value in (extra or {}).items():
        if not asks_for_nothing(field, value):
            raise unsupported(field_name(field), runtime)


def not_ready(model: str, reason: str, *, retry_after: int = 2) -> Failure:
    """A model is loading, has crashed, or its upstream is away."""
    return Failure(503, "model_not_ready", f"{model} is not ready: {reason}", retry_after=retry_after, elsewhere=True)


def timed_out(seconds: float) -> Failure:
    """The time of a request is over."""
    return Failure(504, "timeout", f"no complete answer within {seconds:g} s", elsewhere=True)
