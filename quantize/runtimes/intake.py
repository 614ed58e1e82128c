"""How a served model has its requests read: in a process beside it, so that none can end the model or hold it up.

In: what a request has of text, and what its answer must fit. Out: its tokens, and Masks to keep to; or
Refused with the field that it is about. For several threads at once.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import orjson

from quantize.runtimes.desk import end_of
from quantize.runtimes.served import PromptTokens, Refused
from quantize.system.forks import CopyDied, ForkServer, receive

POLL_SECONDS = 0.05
REMEMBERED = 256  # schemas and grammars that were refused: nobody pays for the same one twice
LOST = Refused(503, "engine_failed", "the process that reads requests ended")
# What each stage is about: code, parameter, and how a message begins. Those of a schema name the field it came in.
STAGES = {
    "": ("engine_failed", None, "reading the request"),
    "template": ("chat_template", "messages", "the model's chat template"),
    "tokens": ("prompt_not_read", None, "splitting the text into tokens"),
    "schema": ("invalid_json_schema", "response_format", "turning the JSON schema into a grammar"),
    "grammar": ("invalid_grammar", "grammar", "reading the grammar"),
    "mask": ("invalid_grammar", "grammar", "choosing a token that fits"),
}


class Masks:
    """Which tokens may come next in one answer, as told by its copy."""

    def __init__(self, pipe: Connection, asked: Mapping[str, Any]) -> None:
        self.pipe = pipe
        self.param: str = asked["param"]
        self._asked = asked

    def poll(self) -> bytes | None:
        """A byte for each token of the vocabulary, 0 where it may come next; None: not known yet. Raises Refused."""
        try:
            return receive(self.pipe) if self.pipe.poll() else None
        except CopyDied as exc:
            raise _refusal(exc, "mask", self._asked) from exc
        except (EOFError, OSError) as exc:
            raise LOST from exc

    def accept(self, token: int) -> None:
        """Go on with a token."""
        try:
            self.pipe.send_bytes(token.to_bytes(4, "little"))
        except OSError:
            return  # why is told by the next poll

    def close(self) -> None:
        """The answer is over."""
        self.pipe.close()


class Intake:
    """The process, and copies of it."""

    def __init__(self, setup: str, options: bytes, environment: Mapping[str, str] | None = None) -> None:
        """setup: "module:function" that makes a Desk's serve and told of the options."""
        self._server = ForkServer(setup, options, environment)
        self._lock = threading.Lock()
        self._spare: Connection | None = None
        self._refused: OrderedDict[bytes, Mapping[str, Any]] = OrderedDict()

    def warning(self) -> str:
        """Wait until it is there: what is wrong with the chat template, or "". Raises Refused: it does not start."""
        try:
            told: str = orjson.loads(self._server.told())["warning"]
        except (EOFError, OSError) as exc:
            raise Refused(503, "engine_failed", "the process that reads requests does not start") from exc
        return told

    def read(self, order: Mapping[str, Any], cancelled: threading.Event) -> PromptTokens:
        """See ServedModel."""
        asked: Mapping[str, Any] = order.get("fit") or {}
        if not asked and isinstance(order.get("prompt"), list):
            return PromptTokens(list(order["prompt"]))
        known = hashlib.sha256(orjson.dumps(asked)).digest() if asked else b""
        if known in self._refused:
            raise _again(self._refused[known])
        wanted = {key: order[key] for key in ("messages", "tools", "lead", "prompt", "fit") if order.get(key)}
        wanted = {"tools": (), "lead": "", "prompt": "", **wanted}
        try:
            pipe, told = self._ask(orjson.dumps(wanted), cancelled, asked)
        except Refused as exc:
            if known and exc.fields["param"] in (asked.get("param"), "grammar"):
                self._remember(known, exc.fields)
            raise
        tokens = told["tokens"]
        if asked:
            return PromptTokens(tokens, Masks(pipe, asked))
        pipe.close()
        return PromptTokens(tokens)

    def _ask(
        self, order: bytes, cancelled: threading.Event, asked: Mapping[str, Any]
    ) -> tuple[Connection, dict[str, Any]]:
        stage = ""
        for last in (False, True):  # a spare copy may be of a process that has ended meanwhile
            pipe = self._copy()
            try:
                pipe.send_bytes(order)
                while True:
                    while not pipe.poll(POLL_SECONDS):
                        if cancelled.is_set():
                            raise LOST
                    told = orjson.loads(receive(pipe))
                    stage = told.get("stage", stage)
                    if "refused" in told:
                        raise _again(told["refused"])
                    if "tokens" in told:
                        return pipe, told
            except CopyDied as exc:
                pipe.close()
                raise _refusal(exc, stage, asked) from exc
            except (EOFError, OSError) as exc:
                pipe.close()
                if last or stage:
                    raise LOST from exc
            except Refused:
                pipe.close()
                raise
        raise AssertionError("the second attempt returns or raises")

    def _copy(self) -> Connection:
        """A copy that was made ahead, and another for the next who asks."""
        with self._lock:
            try:
                ready, self._spare = self._spare, self._server.open()
                return ready or self._server.open()
            except (EOFError, OSError) as exc:
                raise LOST from exc

    def _remember(self, known: bytes, fields: Mapping[str, Any]) -> None:
        with self._lock:
            self._refused[known] = fields
            while len(self._refused) > REMEMBERED:
                self._refused.popitem(last=False)

    def close(self) -> None:
        """End it."""
        with self._lock:
            if self._spare is not None:
                self._spare.close()
            self._server.close()


def _refusal(death: CopyDied, stage: str, asked: Mapping[str, Any]) -> Refused:
    code, param, what = STAGES[stage]
    if stage in ("schema", "grammar", "mask") and "json_schema" in asked:
        code, param = "invalid_json_schema", asked["param"]
        what = what if stage == "schema" else "keeping to the JSON schema"
    return Refused(422, code, f"{what} {end_of(death, stage or 'tokens')}", param)


def _again(fields: Mapping[str, Any]) -> Refused:
    return Refused(fields["status"], fields["code"], fields["message"], fields["param"])
