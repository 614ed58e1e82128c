"""llama.cpp as a Runtime: the build that llama-cpp-python carries, with flash attention off:
left to itself llama.cpp turns it on where it can, and answers change by that alone.

In: a GGUF file and token ids. Out: log-probabilities and greedy answers. Only the C interface is used, so that memory
is one block of logits and a KV cache of one context, which several answers share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.errors import UsageError
from quantize.runtimes.base import OneWindowAtATime, Prompted, block_rows, goes_on, in_groups, log_softmax
from quantize.runtimes.devices import ON_CPU, DevicePlace
from quantize.runtimes.llama_cpp.model import BatchToken, ModelSettings, OpenModel

if TYPE_CHECKING:
    from quantize.runtimes.base import LogProbs

FEATURE = "evaluating a GGUF file"
ANSWERS_AT_ONCE = 8  # one token each: a decode of 8 reads the weights once


class LlamaCppRuntime(OneWindowAtATime):
    """A GGUF file in llama.cpp; `token_text` is the file's own piece, to hold against the source's tokenizer."""

    def __init__(
        self, path: Path, known: tuple[str, str], *, context: int, threads: int = 0, place: DevicePlace = ON_CPU
    ) -> None:
        self.name, self.version = known
        self.warnings: tuple[str, ...] = ()
        self._file = path.name
        if threads:
            _limit_threads(threads)
        settings = ModelSettings(
            context, ANSWERS_AT_ONCE, shared=True, batch=block_rows, threads=threads, flash_attention=False, place=place
        )
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
        """See Runtime; prompts of like length go together, as many as the context holds with their answers."""
        for request in requests:
            if _tokens([request]) > self._size:
                prompt, more = len(request.token_ids), request.max_tokens
                raise UsageError(f"a prompt of {prompt} tokens and {more} more exceed the context of {self._size}")
        answers: dict[int, list[int]] = {}
        for members in in_groups(requests, self._fit):
            self._model.forget()
            answers.update(self._answer({index: requests[index] for index in members}))
        return [answers[index] for index in range(len(requests))]

    def _fit(self, requests: Sequence[Prompted]) -> bool:
        return len(requests) <= ANSWERS_AT_ONCE and _tokens(requests) <= self._size

    def _answer(self, requests: Mapping[int, Prompted]) -> dict[int, list[int]]:
        """Greedy answers, each in a sequence of its own; one that is done costs nothing from there on."""
        chosen: dict[int, list[int]] = {}
        last: dict[int, int] = {}
        for sequence, (index, request) in enumerate(requests.items()):
            for start in range(0, len(request.token_ids), self._rows):
                self._decode(request.token_ids[start : start + self._rows], start, every=False, sequence=sequence)
            chosen[index], last[index] = [], int(self._model.logits(1)[0].argmax())
        sequences = {index: sequence for sequence, index in enumerate(requests)}
        while True:
            left = [index for index in last if goes_on(requests[index], chosen[index], last[index])]
            if not left:
                return chosen
            rows = [
                BatchToken(last[index], len(requests[index].token_ids) + len(chosen[index]) - 1, sequences[index], True)
                for index in left
            ]
            self._model.decode(rows)
            last = dict(zip(left, self._model.logits(len(left)).argmax(axis=1).tolist(), strict=True))

    def close(self) -> None:
        """See Runtime."""
        self._model.close()

    def _decode(self, tokens: Sequence[int], position: int, *, every: bool, sequence: int = 0) -> None:
        """Run tokens at a position; logits for each of them (every), or for the last."""
        last = len(tokens) - 1
        self._model.decode(
            BatchToken(token, position + index, sequence, every or index == last) for index, token in enumerate(tokens)
        )


def _limit_threads(threads: int) -> None:
    """Of what is made of the logits; llama.cpp has its own."""
    import torch

    torch.set_num_threads(threads)


def _tokens(requests: Sequence[Prompted]) -> int:
    """Of prompts and answers, at most."""
    return sum(len(request.token_ids) + request.max_tokens for request in requests)
