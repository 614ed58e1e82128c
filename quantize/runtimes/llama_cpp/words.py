"""The vocabulary of a GGUF file in llama.cpp: text to tokens and back, and what the file says of itself.

In: a GGUF file. Out: token ids, bytes of tokens, key-values. Nothing of the weights is read for it.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from quantize.errors import VerifyError
from quantize.runtimes.llama_cpp.library import last_log_line, load_library

NOT_LOADED = "the file is damaged, or of a kind that this llama-cpp-python does not know: build or pull it again"


class Words:
    """The vocabulary of an open file."""

    def __init__(self, library: Any, model: Any, name: str) -> None:
        """model: llama.cpp's pointer to it. name: of the file, for messages."""
        self.library = library
        self.model = model
        self._name = name
        self.vocab = library.llama_model_get_vocab(model)
        self.vocabulary = int(library.llama_vocab_n_tokens(self.vocab))

    def tokenize(self, text: str, *, special: bool, start: bool) -> list[int]:
        """Token ids. special: <|names|> in the text are control tokens. start: begin as the model's sequences do."""
        raw = text.encode("utf-8")
        room = len(raw) + 8
        tokens = (ctypes.c_int32 * room)()
        count = self.library.llama_tokenize(self.vocab, raw, len(raw), tokens, room, start, special)
        if count < 0:
            raise VerifyError(f"{self._name}: its tokenizer makes more tokens of a text than the text has bytes")
        return tokens[:count]

    def piece(self, token: int) -> bytes:
        """The bytes that a token writes; control tokens write none."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self.library.llama_token_to_piece(self.vocab, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def token_text(self, token: int) -> str:
        """The piece of a token as the file has it, control tokens too."""
        raw = self.library.llama_vocab_get_text(self.vocab, token)
        return raw.decode("utf-8", "replace") if raw else ""

    def ends(self, token: int) -> bool:
        """Whether a token ends an answer."""
        return bool(self.library.llama_vocab_is_eog(self.vocab, token))

    def metadata(self, key: str) -> str | None:
        """A key-value of the file as text."""
        size = 4096
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self.library.llama_model_meta_val_str(self.model, key.encode(), buffer, size)
            if count < size:
                return buffer.value.decode("utf-8", "replace") if count >= 0 else None
            size = count + 1

    def special_tokens(self) -> dict[str, str]:
        """What chat templates call the tokens that a text begins and ends with; "" where there is none."""
        names = {"bos_token": self.library.llama_vocab_bos, "eos_token": self.library.llama_vocab_eos}
        numbers = {name: int(get(self.vocab)) for name, get in names.items()}
        return {name: self.token_text(token) if token >= 0 else "" for name, token in numbers.items()}


def open_words(path: Path, *, feature: str) -> Words:
    """Open a file for its vocabulary alone. Raises VerifyError: llama.cpp can't. MissingExtraError."""
    library = load_library(feature)
    params = library.llama_model_default_params()
    params.vocab_only = True
    return Words(library, load_model(library, path, params), path.name)


def load_model(library: Any, path: Path, params: Any) -> Any:
    """llama.cpp's pointer to the model in a file. Raises VerifyError: it does not load."""
    model = library.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise VerifyError(f"{path.name}: llama.cpp does not load it: {last_log_line()}", hint=NOT_LOADED)
    return model
