"""A loaded model as the gateway asks it, in a process of its own: it chooses tokens for several sequences in turn.

In: tokens, and how to choose. Out: tokens. Stops, limits and what goes over HTTP are left to the gateway.
Only light imports: this is loaded before any runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from quantize.runtimes.detokenizer import Detokenizer


class Refused(Exception):
    """A request that this model can't take: HTTP status, code, message and the field that it is about."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.fields = {"status": status, "code": code, "message": message, "param": param}


class Chosen(NamedTuple):
    """A token, its log-probability and the most likely ones: (token, log-probability), where they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Embedding(NamedTuple):
    """What a model makes of a whole text: float32 numbers, little-endian, of length 1 as a vector."""

    values: bytes

    @classmethod
    def of(cls, vector: Any) -> Embedding:
        """A numpy vector of any length but none."""
        length = float((vector * vector).sum()) ** 0.5
        return cls((vector / (length or 1.0)).astype("<f4").tobytes())


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. temperature 0 is greedy. logprobs: None, or how many alternatives to give."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    json_schema: Mapping[str, Any] | None = None
    grammar: str | None = None


@dataclass(frozen=True)
class Serving:
    """How a model is loaded to be served: context: tokens of each of so many sequences at once (slots).

    device: cpu or cuda[:N]. threads: None leaves it to the runtime. gpu_layers: None is all, where a runtime can split.
    As a user asks for it, before preflight has decided: context 0 is the model's own, up to 4,096, and device may be
    "auto".
    """

    context: int = 0
    slots: int = 2
    device: str = "cpu"
    threads: int | None = None
    gpu_layers: int | None = None


@dataclass
class Description:
    """What a model says of itself once it is loaded. devices: how many layers are where.

    tool_style: how it writes tool calls (see tool_style.py), "" for not at all.
    """

    runtime: str
    context: int
    slots: int
    device: str
    supports: Sequence[str]
    devices: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    tool_style: str = ""


class ServedModel(Protocol):
    """A loaded model. Not for two threads at once."""

    description: Description

    def chat_tokens(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), lead: str = ""
    ) -> list[int]:
        """Token ids of a conversation, up to where the answer begins, and of `lead`, which it begins with.

        Raises Refused.
        """

    def text_tokens(self, text: str) -> list[int]:
        """Token ids of a plain text."""

    def begin(self, tokens: Sequence[int], sampling: Sampling) -> int:
        """Take a free slot for a sequence; returns its number. Raises Refused."""

    def begin_embedding(self, tokens: Sequence[int]) -> int:
        """Take a free slot for a text that is only read; returns its number. Raises Refused."""

    def step(self) -> Mapping[int, Chosen | Embedding]:
        """Go one step on with every sequence; the next token of those that have one, or what was to be made of it."""

    def end(self, slot: int) -> None:
        """Give a slot back."""

    def ends(self, token: int) -> bool:
        """Whether a token ends an answer."""

    def token_of(self, text: str) -> int | None:
        """The one token that is this text and writes nothing of it, if there is such a control token."""

    def detokenizer(self) -> Detokenizer:
        """For one answer."""

    def token_bytes(self, token: int) -> bytes:
        """What a token writes, for log-probabilities."""

    def memory(self) -> dict[str, Any]:
        """gpu (its name or None), vram_allocated, vram_reserved, in bytes."""


Progress = Callable[[float], None]
