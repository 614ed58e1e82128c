"""A model for tests: repeats the last message word by word, and misbehaves on command. Needs no engine.

In: a FakeKind, such as FakeKind(delay=0.01). Words of the prompt that it obeys: `crash!` and `abort!` end its process,
`oom!` runs out of memory, `hang!` never answers, `stuck!` does not even finish a step, `forever!` never stops. One word
is one token.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import VerifyError
from quantize.runtimes.base import ModelRef
from quantize.runtimes.detokenizer import BytePieces
from quantize.runtimes.served import Chosen, Description, Embedding, Progress, PromptTokens, Refused, Sampling, Serving
from quantize.serve.engines.base import EngineTarget
from quantize.serve.engines.child import serve
from quantize.serve.engines.link import Listener
from quantize.serve.engines.local import LocalEngine

END = 0


@dataclass(frozen=True)
class FakeKind:
    """See ServingKind. refuse: why it does not load. delay: seconds of a step."""

    refuse: str = ""
    load_seconds: float = 0
    delay: float = 0
    supports: Sequence[str] = ("logprobs",)
    tool_style: str = ""
    name: str = "fake"

    def serve(self, model: ModelRef, serving: Serving, progress: Progress) -> FakeModel:
        """See ServingKind."""
        if self.refuse:
            raise VerifyError(self.refuse)
        for percent in range(0, 101, 20):
            progress(percent / 100)
            time.sleep(self.load_seconds / 6)
        return FakeModel(self, serving)


class FakeModel:
    """See ServedModel."""

    def __init__(self, kind: FakeKind, serving: Serving) -> None:
        self._delay = kind.delay
        self.description = Description(
            kind.name, serving.context, serving.slots, "cpu", kind.supports, {"cpu": 1}, tool_style=kind.tool_style
        )
        self._words = ["</s>"]
        self._numbers: dict[str, int] = {}
        self._answers: dict[int, list[int]] = {}
        self._texts: dict[int, list[float]] = {}

    def read(self, order: Mapping[str, Any], cancelled: threading.Event) -> PromptTokens:
        """See ServedModel. It is told nothing of tools: what a test wants it to call is in the messages."""
        given = order.get("prompt", "")
        texts = [message["content"] for message in order["messages"]] if "messages" in order else [given]
        tokens = given if isinstance(given, list) else [self._number(word) for text in texts for word in text.split()]
        return PromptTokens(tokens)

    def begin(self, prompt: PromptTokens, sampling: Sampling) -> int:
        """See ServedModel."""
        tokens = prompt.tokens
        words = self._known(tokens)
        if "abort!" in words:
            os.write(2, b"a line with the prompt\nfake.c:1: GGML_ASSERT(all is well) failed\n")
            os.kill(os.getpid(), signal.SIGABRT)
        if "crash!" in words:
            os.kill(os.getpid(), signal.SIGKILL)
        slot = next(slot for slot in range(self.description.slots) if slot not in self._answers)
        self._answers[slot] = [*tokens, END]
        return slot

    def begin_embedding(self, tokens: Sequence[int]) -> int:
        """See ServedModel: the number of words, and of letters in them, as a vector."""
        slot = next(slot for slot in range(self.description.slots) if slot not in self._answers)
        self._texts[slot] = [float(len(tokens)), float(sum(map(len, self._known(tokens))))]
        self._answers[slot] = []
        return slot

    def _known(self, tokens: Sequence[int]) -> list[str]:
        words = [self._words[token] for token in tokens if token < len(self._words)]
        if len(words) < len(tokens):
            raise Refused(422, "invalid_value", "no such token", "prompt")
        return words

    def step(self) -> Mapping[int, Chosen | Embedding]:
        """See ServedModel."""
        time.sleep(self._delay)
        chosen: dict[int, Chosen | Embedding] = {}
        for slot, numbers in self._texts.items():
            chosen[slot] = Embedding(struct.pack("<2f", *(number / math.hypot(*numbers) for number in numbers)))
        for slot, answer in self._answers.items():
            if slot in self._texts:
                continue
            word = self._words[answer[0]]
            if word == "oom!":
                raise MemoryError
            if word == "stuck!":
                time.sleep(60)
            if word == "hang!":
                time.sleep(0.005)
                continue
            chosen[slot] = Chosen(answer[0], -0.5, ((answer[0], -0.5),))
            if word != "forever!":
                del answer[0]
        return chosen

    def end(self, slot: int) -> None:
        """See ServedModel."""
        del self._answers[slot]
        self._texts.pop(slot, None)

    def token_of(self, text: str) -> int | None:
        """See ServedModel."""
        return None

    def ends(self, token: int) -> bool:
        """See ServedModel."""
        return token == END

    def detokenizer(self) -> BytePieces:
        """See ServedModel."""
        return BytePieces(self.token_bytes)

    def token_bytes(self, token: int) -> bytes:
        """See ServedModel."""
        return (self._words[token] + " ").encode()

    def memory(self) -> dict[str, Any]:
        """See ServedModel."""
        return {"gpu": None}

    def close(self) -> None:
        """See ServedModel."""

    def _number(self, word: str) -> int:
        if word not in self._numbers:
            self._numbers[word] = len(self._words)
            self._words.append(word)
        return self._numbers[word]


class ThreadChild:
    """A child in a thread of this process, for quick tests of everything around it. `kill` closes its socket."""

    def __init__(self, connection: socket.socket, theirs: socket.socket) -> None:
        self.connection = connection
        self.pid = os.getpid()
        self._theirs = theirs
        self._thread = threading.Thread(target=serve, args=(theirs,), daemon=True)
        self._thread.start()

    @classmethod
    async def start(cls) -> ThreadChild:
        """See ProcessChild."""
        return cls(*socket.socketpair())

    async def wait(self) -> str:
        """See Child."""
        self.kill()
        return "the model's thread ended"

    def kill(self) -> None:
        """See Child."""
        with contextlib.suppress(OSError):
            self._theirs.shutdown(socket.SHUT_RDWR)
        self._theirs.close()


def fake_target(name: str, *, context: int = 512, slots: int = 2, **options: Any) -> EngineTarget:
    """What a child with a FakeModel is to load; the options are a FakeKind's."""
    return EngineTarget(name, FakeKind(**options), ModelRef(Path(), "fake"), Serving(context, slots))


def fake_engine(name: str, tell: Listener, **options: Any) -> LocalEngine:
    """A LocalEngine with a FakeModel in a thread; options as fake_target takes them."""
    return LocalEngine(fake_target(name, **options), tell, ThreadChild.start)
