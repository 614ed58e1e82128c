"""llama.cpp as a Runtime: the build that llama-cpp-python carries, with flash attention off:
left to itself llama.cpp turns it on where it can, and answers change by that alone.

In: a GGUF file and token ids. Out: log-probabilities and greedy answers. Only the C interface is used, so that memory
is one block of logits and a KV cache for one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.errors import UsageError
from quantize.runtimes.base import OneWindowAtATime, Prompted, block_rows, log_softmax
from quantize.runtimes.devices import ON_CPU, DevicePlace
from quantize.runtimes.llama_cpp.model import BatchToken, ModelSettings, OpenModel

if TYPE_CHECKING:
    from quantize.runtimes.base import LogProbs

FEATURE = "evaluating a GGUF file"


class LlamaCppRuntime(OneWindowAtATime):
    """A GGUF file in llama.cpp; `token_text` is the file's own piece, to hold against the source's tokenizer."""

    def __init__(
        self, path: Path, known: tuple[str, str], *, context: int, threads: int = 0, place: DevicePlace = ON_CPU
    ) -> None:
        self.name, self.version = known
        self.warnings: tuple[str, ...] = ()
        self._file = path.name
        settings = ModelSettings(context, batch=block_rows, threads=threads, flash_attention=False, place=place)
        self._model = OpenModel(path, settings, feature=FEATURE)
        self.vocabulary = self._model.vocabulary
        self._rows, self._size = self._model.batch_tokens, self._model.size

    def token_text(self, token: int) -> str:
        """The piece of a token as the file has it."""
        return self._model.token_text(token)

    def log_probs(self, window: Sequence[int]) -> Iterator[LogProbs]:
        """See Runtime."""
        self._model.forget()
        last = len(window) - 1  # nothing is predicted from the last token
        for start in range(0, last, self._rows):
            stop = min(start + self._rows, last)
            self._decode(window[start:stop], start, every=True)
            yield log_softmax(self._model.logits(stop - start), self._file)

    def answer(self, requests: Sequence[Prompted]) -> list[list[int]]:
        """See Runtime; one request after the other."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Prompted) -> list[int]:
        prompt = request.token_ids
        if len(prompt) + request.max_tokens > self._size:
            raise UsageError(
                f"a prompt of {len(prompt)} tokens and {request.max_tokens} more exceed the context of {self._size}"
            )
        self._model.forget()
        for start in range(0, len(prompt), self._rows):
            self._decode(prompt[start : start + self._rows], start, every=False)
        chosen: list[int] = []
        while True:
            token = int(self._model.logits(1)[0].argmax())
            if token in request.stop:
                return chosen
            chosen.append(token)
            if len(chosen) == request.max_tokens:
                return chosen
            self._decode([token], len(prompt) + len(chosen) - 1, every=False)

    def close(self) -> None:
        """See Runtime."""
        self._model.close()

    def _decode(self, tokens: Sequence[int], position: int, *, every: bool) -> None:
        """Run tokens at a position; logits for each of them (every), or for the last."""
        last = len(tokens) - 1
        self._model.decode(
            BatchToken(token, position + index, 0, every or index == last) for index, token in enumerate(tokens)
        )
