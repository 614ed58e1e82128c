"""A folder's tokenizer for a served model: requests are read beside it, and tokens become text.

In: a folder in the Hugging Face layout. Out: what every ServedModel of such a folder says of text and tokens alike.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson

from quantize.runtimes.intake import Intake
from quantize.runtimes.served import PromptTokens
from quantize.runtimes.tool_style import tool_style

DESK = "quantize.runtimes.transformers.desk:open_desk"
NO_TEXT = "\ufffd"


class FolderWords:
    """The parts of ServedModel that a tokenizer answers."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = _open_tokenizer(folder)
        self._intake = Intake(DESK, _desk_options(self._tokenizer))
        self._ends: frozenset[int] = frozenset()

    def warning(self) -> str:
        """What is wrong with the chat template; "" for nothing."""
        return self._intake.warning()

    def tool_style(self) -> str:
        """How the template writes tool calls."""
        return tool_style(_template_of(self._tokenizer) or "")

    def end_with(self, *tokens: int | Iterable[int] | None) -> None:
        """Tokens that end an answer, beside the tokenizer's own."""
        found: set[int] = set()
        for value in (*tokens, self._tokenizer.eos_token_id):
            if isinstance(value, int):
                found.add(value)
            elif value is not None:
                found.update(int(item) for item in value)
        self._ends = frozenset(found)

    def read(self, order: Mapping[str, Any], cancelled: threading.Event) -> PromptTokens:
        """See ServedModel."""
        return self._intake.read(order, cancelled)

    def ends(self, token: int) -> bool:
        """See ServedModel."""
        return token in self._ends

    def token_of(self, text: str) -> int | None:
        """See ServedModel."""
        token = self._tokenizer.convert_tokens_to_ids(text)  # that of unknown text, where there is no such token
        known = token in self._tokenizer.all_special_ids and self._tokenizer.convert_ids_to_tokens(token) == text
        return token if known else None

    def detokenizer(self) -> StreamPieces:
        """See ServedModel."""
        return StreamPieces(self._tokenizer)

    def token_bytes(self, token: int) -> bytes:
        """See ServedModel."""
        return str(self._tokenizer.decode([token])).encode("utf-8")

    def close(self) -> None:
        """See ServedModel."""
        self._intake.close()


class StreamPieces:
    """A Detokenizer by the tokenizer's own streaming decoder: control tokens write nothing.

    Where a model writes bytes that are no text, that decoder can fail ("Invalid prefix encountered", as in
    vllm-project/vllm#17448), and would go on failing: a new one goes on, after a character for what was lost.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer._tokenizer
        self._begin()

    def _begin(self) -> None:
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        """See Detokenizer."""
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception:  # noqa: BLE001 - the library raises no other kind
            self._begin()
            return NO_TEXT + (self._stream.step(self._tokenizer, token) or "")

    def flush(self) -> str:
        """See Detokenizer: what is not whole by now never will be."""
        return ""


def _open_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _template_of(tokenizer: Any) -> str | None:
    """The template of plain chats; None: there is none."""
    try:
        found: str = tokenizer.get_chat_template()
    except ValueError:
        return None
    return found


def _desk_options(tokenizer: Any) -> bytes:
    """The tokenizer as it was loaded, for the process that reads requests."""
    return orjson.dumps({
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "template": _template_of(tokenizer),
        "special": tokenizer.special_tokens_map,
    })  # fmt: skip
