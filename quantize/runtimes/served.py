"""A loaded model as the gateway asks it, in a process of its own: it chooses tokens for several sequences in turn.

In: tokens, and how to choose. Out: tokens. Stops, limits and what goes over HTTP are left to the gateway.
Only light imports: this is loaded before any runtime.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from quantize.runtimes.detokenizer import Detokenizer
from quantize.runtimes.devices import DevicePlace

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


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


class NextTokens(Protocol):
    """Which tokens may come next in an answer that must fit something."""

    pipe: Connection
    param: str  # the field that says so

    def poll(self) -> bytes | None:
        """A byte for each token of the vocabulary, 0 where it may come next; None: not known yet. Raises Refused."""

    def accept(self, token: int) -> None:
        """Go on with a token."""

    def close(self) -> None:
        """The answer is over."""


@dataclass
class PromptTokens:
    """A request that has been read. masks: what the answer must keep to, if anything."""

    tokens: list[int]
    masks: NextTokens | None = None

    def close(self) -> None:
        """It is not wanted any more."""
        if self.masks is not None:
            self.masks.close()


@dataclass(frozen=True)
class Flag:
    """How `quantize serve` takes a setting: its help, and the least number or the words that it may be.

    name: where it is not the field's own. default: the command's, where it is not the field's.
    """

    help: str
    least: int | None = None
    choices: tuple[str, ...] = ()
    name: str = ""
    default: str = ""


def flag(value: Any, help: str, **how: Any) -> Any:
    """A field of Serving that is a flag of the command. how: of Flag."""
    return field(default=value, metadata={"flag": Flag(help, **how)})


KV_BITS = {"16": "f16", "8": "q8_0", "4": "q4_0"}  # of a number in the KV cache -> llama.cpp's name of the type


@dataclass(frozen=True)
class Serving:
    """How a model is loaded to be served: context: tokens of each of so many sequences at once (slots).

    A field by `flag` is a flag of the command by that alone, and comes as it is to every runtime.
    device, gpu_layers, shares: see DevicePlace. threads: None leaves it to the runtime. named: the device was asked for
    by name, and nothing else will do.
    As a user asks for it, before preflight has decided: context 0 is the model's own, up to 4,096, and device may be
    "auto".
    """

    context: int = flag(0, "Tokens of a sequence.  [default: the model's, to 4096]", least=16)
    slots: int = flag(2, "Answers at once.", least=1, name="concurrency")
    device: str = flag("cpu", "auto, cpu, gpu, or one such as cuda:0, vulkan:0.", default="auto")
    threads: int | None = flag(None, "CPU threads of each model.  [default: all cores but one]", least=1)
    gpu_layers: int | None = flag(None, "Layers of a GGUF file on the GPU.  [default: all]", least=0)
    kv_bits: str = flag("16", "Of the KV cache; 8 and 4: GGUF files only.", choices=tuple(KV_BITS))
    named: bool = False
    shares: tuple[float, ...] = ()

    @property
    def place(self) -> DevicePlace:
        """Where, once preflight has decided."""
        return DevicePlace(self.device, self.gpu_layers, self.shares)


@dataclass
class Description:
    """What a model says of itself once it is loaded. devices: how many layers are where.

    tool_style: how it writes tool calls (see tool_style.py), "" for not at all. kernel: what computes quantized
    linears, a class's name, where there are several.
    """

    runtime: str
    context: int
    slots: int
    device: str
    supports: Sequence[str]
    devices: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    tool_style: str = ""
    kernel: str = ""


class ServedModel(Protocol):
    """A loaded model. Not for two threads at once, but for `read`."""

    description: Description

    def read(self, order: Mapping[str, Any], cancelled: threading.Event) -> PromptTokens:
        """The tokens of a request, and what its answer must fit; called in a thread of its own, others meanwhile.

        order: a conversation (messages, tools, and lead, which the answer begins with) or a prompt, as text or as token
        ids; and fit: {"json_schema", "param"} or {"grammar"}. Raises Refused.
        """

    def begin(self, prompt: PromptTokens, sampling: Sampling) -> int:
        """Take a free slot for a sequence; returns its number. Raises Refused."""

    def begin_embedding(self, tokens: Sequence[int]) -> int:
        """Take a free slot for a text that is only read; returns its number. Raises Refused."""

    def step(self) -> Mapping[int, Chosen | Embedding | Refused]:
        """Go one step on with every sequence: the next token of those that have one, what was to be made of it, or why
        it can't go on.
        """

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

    def close(self) -> None:
        """End what runs beside it."""


Progress = Callable[[float], None]
