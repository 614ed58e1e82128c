"""A model for tests: repeats the last message word by word, and misbehaves on command. Needs no engine.

In: options such as {"delay": 0.01, "context": 64}. Words of the prompt that it obeys: `crash!` and `abort!` end its
process, `oom!` runs out of memory, `hang!` never answers, `stuck!` does not even finish a step, `forever!` never stops.
One word is one token.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from quantize.errors import VerifyError
from quantize.serve.engines.child import serve
from quantize.serve.engines.link import EngineTarget, Listener
from quantize.serve.engines.local import LocalEngine
from quantize.serve.engines.model import Chosen, Description, Progress, Refused, Sampling
from quantize.serve.engines.text import BytePieces

END = 0


class FakeModel:
    """See Model."""

    def __init__(self, options: Mapping[str, Any], progress: Progress) -> None:
        self._options = dict(options)
        if options.get("refuse"):
            raise VerifyError(str(options["refuse"]))
        for percent in range(0, 101, 20):
            progress(percent / 100)
            time.sleep(float(options.get("load_seconds", 0)) / 6)
        slots = int(options.get("slots", 2))
        self.description = Description(
            "fake", int(options.get("context", 512)), slots, "cpu", options.get("supports", ["logprobs"]), {"cpu": 1}
        )
        self._words = ["</s>"]
        self._numbers: dict[str, int] = {}
        self._answers: dict[int, list[int]] = {}

    def chat_tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """See Model."""
        return [token for message in messages for token in self.text_tokens(message["content"])]

    def text_tokens(self, text: str) -> list[int]:
        """See Model."""
        return [self._number(word) for word in text.split()]

    def begin(self, tokens: Sequence[int], sampling: Sampling) -> int:
        """See Model."""
        words = [self._words[token] for token in tokens if token < len(self._words)]
        if len(words) < len(tokens):
            raise Refused(422, "invalid_value", "no such token", "prompt")
        if "abort!" in words:
            os.write(2, b"a line with the prompt\nfake.c:1: GGML_ASSERT(all is well) failed\n")
            os.kill(os.getpid(), signal.SIGABRT)
        if "crash!" in words:
            os.kill(os.getpid(), signal.SIGKILL)
        slot = next(slot for slot in range(self.description.slots) if slot not in self._answers)
        self._answers[slot] = [*tokens, END]
        return slot

    def step(self) -> dict[int, Chosen]:
        """See Model."""
        time.sleep(float(self._options.get("delay", 0)))
        chosen = {}
        for slot, answer in self._answers.items():
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
        """See Model."""
        del self._answers[slot]

    def ends(self, token: int) -> bool:
        """See Model."""
        return token == END

    def detokenizer(self) -> BytePieces:
        """See Model."""
        return BytePieces(self.token_bytes)

    def token_bytes(self, token: int) -> bytes:
        """See Model."""
        return (self._words[token] + " ").encode()

    def memory(self) -> dict[str, Any]:
        """See Model."""
        return {"gpu": None}

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


def fake_engine(name: str, tell: Listener, **options: Any) -> LocalEngine:
    """A LocalEngine with a FakeModel in a thread."""
    return LocalEngine(EngineTarget(name, "fake", options), tell, ThreadChild.start)
