"""llama.cpp as a Runtime: the build that llama-cpp-python carries, with flash attention off.

In: a GGUF file and token ids. Out: log-probabilities and greedy answers. Only the C interface is used, so that memory
is one block of logits and a KV cache for one sequence.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import MissingExtraError, UsageError, VerifyError
from quantize.evaluate.runtimes import Request, block_rows, log_softmax, runtime_of
from quantize.hardware import usable_cores

if TYPE_CHECKING:
    from quantize.evaluate.runtimes import LogProbs

PREFILL_TOKENS = 512

_log_callback: Any = None
_log_lines: list[str] = []


class LlamaCppRuntime:
    """A GGUF file in llama.cpp; `token_texts` are the file's own pieces, to hold against the source's tokenizer."""

    def __init__(self, path: Path, *, context: int, threads: int = 0) -> None:
        self._library = _load_library()
        self.name, self.version = runtime_of("gguf")
        self._path = path
        self._model: Any = None
        self._context: Any = None
        self._open(context, threads)

    def _open(self, context: int, threads: int) -> None:
        library = self._library
        self._model = library.llama_model_load_from_file(str(self._path).encode(), library.llama_model_default_params())
        if not self._model:
            raise VerifyError(f"{self._path.name}: llama.cpp does not load it", hint=_last_log_line())
        self._vocab = library.llama_model_get_vocab(self._model)
        self.vocabulary = int(library.llama_vocab_n_tokens(self._vocab))
        trained = int(library.llama_model_n_ctx_train(self._model))
        self._size = max(context, 16)
        if trained and context > trained:
            self.close()
            raise UsageError(f"{self._path.name}: {context} tokens are more than its context of {trained}")
        params = library.llama_context_default_params()
        params.n_ctx = self._size
        params.n_batch = min(self._size, block_rows(self.vocabulary))
        params.n_ubatch = min(params.n_batch, PREFILL_TOKENS)
        # Left to itself llama.cpp turns it on where it can, and answers change by that alone.
        params.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # Its threads wait for each other by spinning: one core that is busy elsewhere makes all of them slow.
        params.n_threads = params.n_threads_batch = threads or max(1, usable_cores() - 1)
        self._rows = int(params.n_batch)
        self._context = library.llama_init_from_model(self._model, params)
        if not self._context:
            self.close()
            raise VerifyError(f"{self._path.name}: llama.cpp makes no context for it", hint=_last_log_line())

    def token_text(self, token: int) -> str:
        """The piece of a token as the file has it."""
        raw = self._library.llama_vocab_get_text(self._vocab, token)
        return raw.decode("utf-8", "replace") if raw else ""

    def log_probs(self, window: Sequence[int]) -> Iterator[LogProbs]:
        """See Runtime."""
        self._forget()
        last = len(window) - 1  # nothing is predicted from the last token
        for start in range(0, last, self._rows):
            stop = min(start + self._rows, last)
            self._decode(window[start:stop], start, every=True)
            yield log_softmax(self._logits(stop - start), self._path.name)

    def answer(self, requests: Sequence[Request]) -> list[list[int]]:
        """See Runtime; one request after the other."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> list[int]:
        prompt = request.token_ids
        if len(prompt) + request.max_tokens > self._size:
            raise UsageError(
                f"a prompt of {len(prompt)} tokens and {request.max_tokens} more exceed the context of {self._size}"
            )
        self._forget()
        for start in range(0, len(prompt), self._rows):
            self._decode(prompt[start : start + self._rows], start, every=False)
        chosen: list[int] = []
        while True:
            token = int(self._logits(1)[0].argmax())
            if token in request.stop:
                return chosen
            chosen.append(token)
            if len(chosen) == request.max_tokens:
                return chosen
            self._decode([token], len(prompt) + len(chosen) - 1, every=False)

    def close(self) -> None:
        """See Runtime."""
        if self._context:
            self._library.llama_free(self._context)
        if self._model:
            self._library.llama_model_free(self._model)
        self._context = self._model = None

    def _forget(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def _decode(self, tokens: Sequence[int], position: int, *, every: bool) -> None:
        """Run tokens at a position; logits for each of them (every), or for the last."""
        batch = self._library.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for index, token in enumerate(tokens):
                if not 0 <= token < self.vocabulary:
                    raise VerifyError(f"{self._path.name}: has no token {token}; it is not of the same vocabulary")
                batch.token[index], batch.pos[index] = token, position + index
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
                batch.logits[index] = every or index == len(tokens) - 1
            if self._library.llama_decode(self._context, batch) != 0:
                raise VerifyError(f"{self._path.name}: llama.cpp can't run it", hint=_last_log_line())
        finally:
            self._library.llama_batch_free(batch)

    def _logits(self, rows: int) -> Any:
        import numpy as np

        return np.ctypeslib.as_array(self._library.llama_get_logits(self._context), (rows, self.vocabulary))


def _load_library() -> Any:
    """The llama_cpp package, with its log kept instead of printed."""
    global _log_callback
    try:
        import llama_cpp
    except ImportError as exc:
        raise MissingExtraError("evaluating a GGUF file", "gguf") from exc

    def keep(_level: int, text: bytes, _data: Any) -> None:
        _log_lines.append(text.decode("utf-8", "replace"))
        del _log_lines[:-50]

    _log_callback = llama_cpp.llama_log_callback(keep)  # llama.cpp keeps the pointer: it must outlive this call
    llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def _last_log_line() -> str:
    lines = [line.strip() for line in _log_lines if line.strip()]
    failed = [line for line in lines if "fail" in line.lower() or "error" in line.lower()]
    return (failed or lines or ["llama.cpp gave no message"])[-1][:300]
