"""The process that a local model lives in: loads it, then answers what the gateway asks over a socket, line by line.

In: JSON lines {"op": "load" | "generate" | "cancel" | "ping"}. Out: JSON lines {"progress" | "ready" | "failed" |
"pong"} and, for each request, {"id", "start"}, {"id", "text"}, {"id", "end"} or {"id", "fail"}. Text is never printed
or logged here.
"""

from __future__ import annotations

import base64
import faulthandler
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import orjson

from quantize.errors import QuantizeError, first_line
from quantize.runtimes.base import ModelRef, ServingKind
from quantize.runtimes.served import Chosen, Embedding, PromptTokens, Refused, Sampling, ServedModel, Serving
from quantize.serve.engines.text import StopFilter
from quantize.system.gpus import number_by_address
from quantize.system.process import spin_briefly

PROGRESS_SECONDS = 0.1
PROBE_TOKENS = 64  # long enough for the kernels of whole batches: one token, or up to 50, take others
Inbox = queue.SimpleQueue[dict[str, Any] | None]
OUT_OF_MEMORY = ("out of memory", "OutOfMemory", "cannot allocate", "can't allocate", "failed to allocate")


class AnswerJob:
    """One request in the model."""

    def __init__(self, number: int, model: ServedModel, order: Mapping[str, Any]) -> None:
        self.number = number
        self.prompt_tokens = self.tokens_left = self.completion_tokens = 0
        self._model = model
        self._text = model.detokenizer()
        self._stops = StopFilter(order.get("stop") or ())
        shown = {model.token_of(text): text for text in order.get("show") or ()}
        self._shown = {token: text for token, text in shown.items() if token is not None}
        self._logprobs: list[dict[str, Any]] = []

    def take(self, chosen: Chosen) -> tuple[str, list[dict[str, Any]], str | None]:
        """Text to send, log-probabilities to send, and why the answer is over, if it is."""
        if self._model.ends(chosen.token):
            return self._finish("stop")
        self.completion_tokens += 1
        self.tokens_left -= 1
        if chosen.logprob is not None:
            self._logprobs.append(self._entry(chosen))
        shown = self._shown.get(chosen.token)
        text = self._stops.add(self._text.add(chosen.token) if shown is None else self._text.flush() + shown)
        if self._stops.stopped:
            return text, self._take_logprobs(), "stop"
        if self.tokens_left == 0:
            rest, logprobs, reason = self._finish("length")
            return text + rest, logprobs, reason
        return text, self._take_logprobs() if text else [], None

    def _finish(self, reason: str) -> tuple[str, list[dict[str, Any]], str]:
        text = self._stops.add(self._text.flush())
        return (text if self._stops.stopped else text + self._stops.flush()), self._take_logprobs(), reason

    def _take_logprobs(self) -> list[dict[str, Any]]:
        taken, self._logprobs = self._logprobs, []
        return taken

    def _entry(self, chosen: Chosen) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in chosen.top]
        return {**self._token(chosen.token, chosen.logprob or 0.0), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._model.token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}


class AnswerLoop:
    """Answers requests with a loaded model, several at once, until the socket closes."""

    def __init__(
        self, connection: socket.socket, model: ServedModel, inbox: queue.SimpleQueue[dict[str, Any] | None]
    ) -> None:
        self._connection = connection
        self._model = model
        self._inbox = inbox
        self._jobs: dict[int, AnswerJob] = {}  # by slot
        self._being_read: dict[int, threading.Event] = {}  # what tells each that nobody waits for it any more
        self._waiting: deque[tuple[dict[str, Any], PromptTokens]] = deque()

    def run(self) -> None:
        """Until the gateway closes the socket."""
        while True:
            while not (self._jobs or self._waiting) or not self._inbox.empty():
                order = self._inbox.get()
                if order is None:
                    return
                self._take(order)
            frames: list[dict[str, Any]] = []
            while self._waiting and len(self._jobs) < self._model.description.slots:
                self._begin(*self._waiting.popleft(), frames)
            if self._jobs:
                self._step(frames)
            send(self._connection, *frames)

    def _take(self, order: dict[str, Any]) -> None:
        number = order.get("id", 0)
        if order["op"] == "generate":
            cancelled = self._being_read[number] = threading.Event()
            try:
                threading.Thread(target=self._read, args=(order, cancelled), daemon=True).start()
            except RuntimeError as exc:  # no more threads in this process
                self._inbox.put({"op": "read", "id": number, "order": order, "prompt": None, "fail": _failed(exc)})
        elif order["op"] == "read":
            prompt, fail = order["prompt"], order["fail"]
            if self._being_read.pop(number, None) is None:
                if prompt is not None:
                    prompt.close()
            elif prompt is None:
                send(self._connection, {"id": number, "fail": fail})
            else:
                self._waiting.append((order["order"], prompt))
        elif order["op"] == "ping":
            send(self._connection, {"pong": True})
        elif order["op"] == "cancel":
            self._cancel(number)

    def _read(self, order: dict[str, Any], cancelled: threading.Event) -> None:
        """Have a request read, in a thread of its own: answers under way don't wait for it."""
        prompt, fail = None, None
        try:
            prompt = self._model.read(order, cancelled)
        except Refused as exc:
            fail = exc.fields
        except Exception as exc:  # noqa: BLE001 - whatever went wrong, the gateway must hear it
            fail = _failed(exc)
        self._inbox.put({"op": "read", "id": order["id"], "order": order, "prompt": prompt, "fail": fail})

    def _cancel(self, number: int) -> None:
        cancelled = self._being_read.pop(number, None)
        if cancelled is not None:
            cancelled.set()
        for order, prompt in [item for item in self._waiting if item[0]["id"] == number]:
            self._waiting.remove((order, prompt))
            prompt.close()
        for slot in [slot for slot, job in self._jobs.items() if job.number == number]:
            self._end(slot)

    def _begin(self, order: dict[str, Any], prompt: PromptTokens, frames: list[dict[str, Any]]) -> None:
        number, tokens = order["id"], prompt.tokens
        try:
            job = AnswerJob(number, self._model, order)
            job.tokens_left = self._room(len(tokens), order)
            if "sampling" in order:
                slot = self._model.begin(prompt, Sampling(**order["sampling"]))
            else:
                slot = self._model.begin_embedding(tokens)
        except Refused as exc:
            prompt.close()
            frames.append({"id": number, "fail": exc.fields})
            return
        job.prompt_tokens = len(tokens)
        self._jobs[slot] = job
        frames.append({"id": number, "start": {"prompt_tokens": len(tokens), "memory": self._model.memory()}})

    def _room(self, prompt: int, order: Mapping[str, Any]) -> int:
        """Tokens that the answer may have. Raises Refused: the prompt or both together are too long."""
        context = self._model.description.context
        limit = min(order["max_input_tokens"] or context - 1, context - 1)
        if prompt < 1:
            raise Refused(422, "empty_prompt", "the prompt has no tokens")
        if prompt > limit:
            raise Refused(413, "input_too_long", f"the input has {prompt} tokens, the limit is {limit}")
        wanted = order["max_tokens"]
        if wanted is None:
            return min(order["max_output_tokens"] or context, context - prompt)
        if prompt + wanted > context:
            message = f"{prompt} tokens of input and {wanted} of output are more than the context of {context}"
            raise Refused(422, "context_length_exceeded", message, "max_tokens")
        return int(wanted)

    def _step(self, frames: list[dict[str, Any]]) -> None:
        try:
            chosen = self._model.step()
        except Exception as exc:  # noqa: BLE001 - whatever went wrong, the gateway must hear it
            fail = _failed(exc)
            for slot in list(self._jobs):
                frames.append({"id": self._jobs[slot].number, "fail": fail})
                self._end(slot)
            return
        for slot, token in chosen.items():
            job = self._jobs[slot]
            if isinstance(token, Refused):
                self._end(slot)
                frames.append({"id": job.number, "fail": token.fields})
                continue
            if isinstance(token, Embedding):
                self._end(slot)
                values = base64.b64encode(token.values).decode()
                frames.append(
                    {"id": job.number, "end": {"tokens": 0, "embedding": values, "memory": self._model.memory()}}
                )
                continue
            try:
                text, logprobs, reason = job.take(token)
            except Exception as exc:  # noqa: BLE001 - of this answer; the others go on
                self._end(slot)
                frames.append({"id": job.number, "fail": _failed(exc)})
                continue
            if text or logprobs:
                frames.append({"id": job.number, "text": text, "logprobs": logprobs, "tokens": job.completion_tokens})
            if reason is not None:
                self._end(slot)
                end = {"finish": reason, "tokens": job.completion_tokens, "memory": self._model.memory()}
                frames.append({"id": job.number, "end": end})

    def _end(self, slot: int) -> None:
        del self._jobs[slot]
        self._model.end(slot)


def _failed(exc: Exception) -> dict[str, Any]:
    """What the gateway is told of an exception that nobody foresaw: its kind, not its message."""
    memory = isinstance(exc, MemoryError) or any(word in f"{type(exc).__name__} {exc}" for word in OUT_OF_MEMORY)
    code = "out_of_memory" if memory else "engine_failed"
    message = "the model ran out of memory" if memory else f"the model failed ({type(exc).__name__})"
    return {"status": 503, "code": code, "message": message, "param": None}


def send(connection: socket.socket, *frames: dict[str, Any]) -> None:
    """Write frames, each on a line of its own; a gateway that is gone is noticed by whoever reads."""
    if frames:
        try:
            connection.sendall(b"".join(orjson.dumps(frame) + b"\n" for frame in frames))
        except OSError:
            return


def serve(connection: socket.socket) -> None:
    """Load what the first line asks for and answer until the other end closes."""
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, inbox), daemon=True).start()
    order = inbox.get()
    if order is None:
        return
    started = time.perf_counter()
    try:
        model = _load(order, _progress_to(connection))
        _answer_once(model)
    except (QuantizeError, Refused) as exc:
        send(connection, {"failed": str(exc)})
        return
    except MemoryError:
        send(connection, {"failed": "out of memory while loading"})
        return
    except Exception as exc:  # noqa: BLE001 - the gateway gives it a name
        send(connection, {"failed": f"{type(exc).__name__}: {first_line(exc)}"})
        return
    seconds = round(time.perf_counter() - started, 3)
    ready = {**asdict(model.description), "load_seconds": seconds, "memory": model.memory()}
    send(connection, {"ready": ready})
    AnswerLoop(connection, model, inbox).run()


def load_order(kind: ServingKind, model: ModelRef, serving: Serving) -> dict[str, Any]:
    """What the gateway tells a child first. The kind says itself how it is loaded: formats of plugins have theirs."""
    return {"op": "load", "target": base64.b64encode(pickle.dumps((kind, model, serving))).decode()}


def _load(order: Mapping[str, Any], progress: Any) -> ServedModel:
    kind, model, serving = pickle.loads(base64.b64decode(order["target"]))  # of the gateway that started this process
    loaded: ServedModel = kind.serve(model, serving, progress)
    return loaded


def _answer_once(model: ServedModel) -> None:
    """A token after a prompt as real ones are, so that "ready" means that it answers; also touches all weights."""
    tokens = model.read({"prompt": "a"}, threading.Event()).tokens * PROBE_TOKENS
    probe = PromptTokens(tokens[: min(PROBE_TOKENS, model.description.context - 1)])
    slot = model.begin(probe, Sampling(temperature=0))
    while slot not in model.step():
        pass
    model.end(slot)


def _progress_to(connection: socket.socket) -> Any:
    last = [0.0, -1]

    def tell(share: float) -> None:
        now, percent = time.monotonic(), int(min(max(share, 0), 1) * 100)
        if percent != last[1] and (now - last[0] > PROGRESS_SECONDS or percent == 100):
            last[:] = [now, percent]
            send(connection, {"progress": percent})

    return tell


def _read(connection: socket.socket, inbox: Inbox) -> None:
    with connection.makefile("rb") as lines:
        try:
            for line in lines:
                inbox.put(orjson.loads(line))
        except (OSError, ValueError):
            pass
    inbox.put(None)
    _on_close()


def _on_close() -> None:
    """In a process of our own: end it, whatever the model is doing. Replaced where the worker is only a thread."""


def main() -> None:
    """Entry point of the process: the argument is the number of the inherited socket."""
    global _on_close
    _on_close = lambda: os._exit(0)  # noqa: E731 - the one place that may end the process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the gateway decides
    faulthandler.enable()  # a crash leaves where it was, and deaths.py reads which library that is
    spin_briefly()
    number_by_address()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
