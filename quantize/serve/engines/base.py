"""What the gateway asks of anything that answers, and what it may ask in return.

In: a Call. Out: a whole answer as a dict, or its server-sent events as bytes. Local models and upstreams are both
Engines; what they can't do is a Failure.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from quantize.runtimes.base import ModelRef, ServingKind
from quantize.runtimes.served import Serving
from quantize.serve.protocol import AnyRequest, ChatRequest, EmbeddingRequest


class EngineState(StrEnum):
    """Where an engine is on its way."""

    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass
class Status:
    """Where an engine is. percent: of loading. reason: why it is not ready. details: what it said of itself."""

    state: EngineState = EngineState.LOADING
    percent: int = 0
    reason: str = "loading"
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        """Whether it answers."""
        return self.state is EngineState.READY


@dataclass
class Call:
    """One request on its way to an engine, and what is known of its answer so far. Times are of time.monotonic()."""

    request: AnyRequest
    body: bytes
    trace_id: str
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_at: float | None = None

    @property
    def is_chat(self) -> bool:
        """Whether it is a conversation, not a plain prompt."""
        return isinstance(self.request, ChatRequest)

    @property
    def path(self) -> str:
        """Where OpenAI's servers take it, after their /v1."""
        if isinstance(self.request, EmbeddingRequest):
            return "/embeddings"
        return "/chat/completions" if self.is_chat else "/completions"

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the tokens."""
        options = getattr(self.request, "stream_options", None)
        return options is not None and bool(options.include_usage)

    def saw_token(self) -> None:
        """Remember when the first token came."""
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()


@dataclass(frozen=True)
class EngineTarget:
    """What a child is to load, in what, and how. runtime: what it runs in, with versions."""

    name: str
    kind: ServingKind
    model: ModelRef
    serving: Serving
    runtime: str = ""


class Engine(Protocol):
    """Something that answers under a name."""

    name: str

    @property
    def runtime(self) -> str:
        """What it runs in."""

    @property
    def status(self) -> Status:
        """Where it is."""

    async def start(self) -> None:
        """Begin to load; returns at once."""

    async def stop(self) -> None:
        """End it, whatever it is doing."""

    async def complete(self, call: Call) -> dict[str, Any]:
        """The whole answer in OpenAI's shape. Raises Failure."""

    def stream(self, call: Call) -> AsyncGenerator[bytes]:
        """The answer as server-sent events, the last one [DONE]. Raises Failure, at any point."""

    def memory_bytes(self) -> int:
        """Resident memory of its process; 0 if it is not ours."""
