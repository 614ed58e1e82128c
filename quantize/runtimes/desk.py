"""What runs in the process beside a served model, where requests are read: each in a copy of its own, within limits.

In: over a Connection, what a request has: messages, a text, what the answer must fit. Out: which stage it is in, then
its tokens or why it is refused, and where the answer must fit something, a mask of the tokens that may come next for
each token that came. A template that does not work is found out before any request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, Protocol

import orjson

from quantize.runtimes.chat_template import CODE, ChatTemplate
from quantize.runtimes.served import Refused
from quantize.system import forks

MEMORY_BYTES = 512 << 20  # of a copy, beside what the process has
MAX_TEXT_BYTES = 8 << 20
LONG_TEXT = 64 << 10
STACK_BYTES = 512  # for each byte of a text: libstdc++'s regular expressions, which llama.cpp uses, recurse for each
LEAST_STACK = 64 << 20
# Processor time of each stage, in seconds. An honest request takes a hundredth of it.
SECONDS = {"template": 2.0, "tokens": 5.0, "schema": 3.0, "grammar": 3.0, "mask": 2.0}
SAMPLE = ({"role": "user", "content": "Hello"},)


class AnswerFit(Protocol):
    """What an answer must fit, as far as it has come."""

    def mask(self) -> bytes:
        """A byte for each token of the vocabulary: 0 where it may come next."""

    def accept(self, token: int) -> None:
        """Go on with a token that the mask allowed."""


Tokenize = Callable[[str, bool], list[int]]
MakeFit = Callable[[Mapping[str, Any], Callable[[str], None]], AnswerFit]


class Desk:
    """Reads requests. tokenize(text, chat): chat is a rendered conversation. fit: None where nothing can be held."""

    def __init__(
        self, tokenize: Tokenize, template: str | None, special: Mapping[str, Any], fit: MakeFit | None = None
    ) -> None:
        self._tokenize, self._fit = tokenize, fit
        self._template: ChatTemplate | None = None
        self._refusal = Refused(422, "no_chat_template", "the model has no chat template: use /v1/completions")
        self._warning = "the model has no chat template: only /v1/completions and /v1/generate answer"
        if template:
            self._warning = self._try_template(template, special)

    def _try_template(self, text: str, special: Mapping[str, Any]) -> str:
        """Compile it and render a plain conversation, in a copy first; what is wrong with it, or "".

        One that can't be compiled, or takes too much for that, is not tried again.
        """

        def attempt() -> bytes:
            with forks.memory(MEMORY_BYTES), forks.seconds(SECONDS["template"]):
                try:
                    made = ChatTemplate(text, special)
                except Refused as exc:
                    return b"!" + str(exc).encode()
                try:
                    _check_size(made.render(SAMPLE))
                except Refused as exc:
                    return (b"!" if isinstance(exc.__cause__, MemoryError) else b"") + str(exc).encode()
            return b""

        try:
            why = forks.attempt(attempt).decode("utf-8", "replace")
        except forks.CopyDied as exc:
            why = f"!the model's chat template {end_of(exc, 'template')}"
        if not why.startswith("!"):
            with forks.memory(MEMORY_BYTES):
                self._template = ChatTemplate(text, special)
            return f"a plain message is refused: {why}" if why else ""
        why = why[1:]
        self._refusal = Refused(422, CODE, why)
        return f"{why}: only /v1/completions and /v1/generate answer"

    def told(self) -> bytes:
        """What the model is told once the desk is there."""
        return orjson.dumps({"warning": self._warning})

    def serve(self, pipe: Connection) -> None:
        """One request, in a copy."""
        forks.more_memory(MEMORY_BYTES)
        order = orjson.loads(pipe.recv_bytes())
        fit = None
        try:
            tokens = self._tokens(order, pipe)
            if "fit" in order and self._fit is not None:
                fit = self._fit(order["fit"], lambda stage: _enter(pipe, stage))
        except Refused as exc:
            pipe.send_bytes(orjson.dumps({"refused": exc.fields}))
            return
        except MemoryError:
            refused = Refused(422, "too_complex", "reading the request takes too much memory")
            pipe.send_bytes(orjson.dumps({"refused": refused.fields}))
            return
        pipe.send_bytes(orjson.dumps({"tokens": tokens}))
        if fit is not None:
            _keep_fitting(pipe, fit)

    def _tokens(self, order: Mapping[str, Any], pipe: Connection) -> list[int]:
        if "messages" in order:
            if self._template is None:
                raise self._refusal
            _enter(pipe, "template")
            text = self._template.render(order["messages"], order["tools"]) + order["lead"]
        elif isinstance(order["prompt"], str):
            text = order["prompt"]
        else:
            return list(order["prompt"])
        size = _check_size(text)
        if size > LONG_TEXT:
            forks.step_back()
        _enter(pipe, "tokens")
        return _with_stack(LEAST_STACK + STACK_BYTES * size, lambda: self._tokenize(text, "messages" in order))


def _enter(pipe: Connection, stage: str) -> None:
    """Say what comes now, and give it its time."""
    pipe.send_bytes(orjson.dumps({"stage": stage}))
    forks.set_seconds(SECONDS[stage])


def _check_size(text: str) -> int:
    size = len(text.encode("utf-8", "replace"))
    if size > MAX_TEXT_BYTES:
        raise Refused(413, "input_too_long", f"the input has {size:,} bytes, the limit is {MAX_TEXT_BYTES:,}")
    return size


def _with_stack(size: int, work: Callable[[], list[int]]) -> list[int]:
    """Call `work` with a stack of so many bytes."""
    forks.more_memory(MEMORY_BYTES + size)
    found: list[int] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.extend(work())
        except BaseException as exc:  # noqa: BLE001 - raised again where it was asked for
            failed.append(exc)

    before = threading.stack_size(size)
    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    if failed:
        raise failed[0]
    return found


def _keep_fitting(pipe: Connection, fit: AnswerFit) -> None:
    """A mask, then for each token the next one, until the other end is closed."""
    while True:
        with forks.seconds(SECONDS["mask"]):
            mask = fit.mask()
        pipe.send_bytes(mask)
        with forks.seconds(SECONDS["mask"]):
            fit.accept(int.from_bytes(pipe.recv_bytes(), "little"))


def end_of(death: forks.CopyDied, stage: str) -> str:
    """How work ended, in words that go on from what it was about."""
    if death.is_time:
        return f"takes more than {SECONDS[stage]:g} s of processor time"
    return f"crashes the library that reads it ({death})"
