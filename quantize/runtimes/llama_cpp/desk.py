"""The desk of a GGUF file: its vocabulary and chat template, and llama.cpp's grammars, beside the model's process.

In: the path of the file. Out: what a ForkServer serves.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from quantize.runtimes.desk import Desk
from quantize.runtimes.llama_cpp.library import import_bindings_only, last_log_line
from quantize.runtimes.llama_cpp.schema.compile import gbnf_of
from quantize.runtimes.llama_cpp.schema.refused import SchemaRefused
from quantize.runtimes.llama_cpp.words import Words, open_words
from quantize.runtimes.served import Refused
from quantize.system.forks import Serve

MAX_REASON = 150
PARSE_ERROR = re.compile(r"error parsing grammar: (.*)")
CANDIDATE_BYTES = 12  # of a llama_token_data: the token, its logit and its probability
LOGIT_HIGH_BYTE = 7  # of them: 0 for 0.0, not 0 for what a grammar has made -inf


def open_desk(options: bytes) -> tuple[Serve, bytes]:
    """Set up a process: see forks.py."""
    import_bindings_only()
    words = open_words(Path(os.fsdecode(options)), feature="serving a GGUF file")
    blank = array.array("i", bytes(CANDIDATE_BYTES * words.vocabulary))  # every token, with a logit of 0
    blank[::3] = array.array("i", range(words.vocabulary))
    candidates = blank.tobytes()
    desk = Desk(
        lambda text, chat: words.tokenize(text, special=True, start=not chat),
        words.metadata("tokenizer.chat_template"), words.special_tokens(),
        lambda asked, enter: GrammarFit(words, candidates, asked, enter),
    )  # fmt: skip
    return desk.serve, desk.told()


class GrammarFit:
    """See AnswerFit: a grammar of llama.cpp's."""

    def __init__(self, words: Words, candidates: bytes, asked: Mapping[str, Any], enter: Callable[[str], None]) -> None:
        """candidates: llama_token_data of every token, which a mask begins with.

        Raises Refused: the schema can't be held by a grammar, or the grammar can't be read.
        """
        grammar = asked.get("grammar")
        if grammar is None:
            enter("schema")
            grammar = _of_schema(asked["json_schema"], asked["param"])
        enter("grammar")
        library = self._library = words.library
        with _errors_kept() as said:
            self._sampler = library.llama_sampler_init_grammar(words.vocab, grammar.encode(), b"root")
            if not self._sampler:
                raise Refused(422, "invalid_grammar", f"llama.cpp can't read the grammar: {said()}", asked["param"])
        self._blank = candidates
        self._data = (library.llama_token_data * words.vocabulary)()

    def mask(self) -> bytes:
        """See AnswerFit."""
        library, size = self._library, len(self._blank)
        ctypes.memmove(self._data, self._blank, size)
        data = ctypes.cast(self._data, ctypes.POINTER(library.llama_token_data))
        candidates = library.llama_token_data_array(data, len(self._data), -1, False)
        library.llama_sampler_apply(self._sampler, ctypes.byref(candidates))
        return ctypes.string_at(self._data, size)[LOGIT_HIGH_BYTE :: size // len(self._data)]

    def accept(self, token: int) -> None:
        """See AnswerFit."""
        self._library.llama_sampler_accept(self._sampler, token)


def _of_schema(schema: str, param: str) -> str:
    try:
        return gbnf_of(json.loads(schema, parse_constant=_refuse_constant))
    except SchemaRefused as exc:
        raise Refused(422, "invalid_json_schema", str(exc), param) from exc
    except RecursionError as exc:
        raise Refused(422, "invalid_json_schema", "the schema is nested too deeply", param) from exc


def _refuse_constant(name: str) -> None:
    raise SchemaRefused((), f"{name} is not JSON")


@contextlib.contextmanager
def _errors_kept() -> Iterator[Callable[[], str]]:
    """While it is open, what C writes to stderr is kept; gives a function that says why a grammar was refused."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)

        def said() -> str:
            file.seek(0)
            found = PARSE_ERROR.search(file.read().decode("utf-8", "replace"))
            return (found[1] if found else last_log_line())[:MAX_REASON]

        try:
            yield said
        finally:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
