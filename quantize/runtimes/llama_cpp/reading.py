"""Embeddings from a llama.cpp model that else writes: texts read a part at a time, between the steps of answers.

In: tokens of a text. Out: one vector of length 1. Mean of the last layer's outputs over all tokens, or that of the last
token where the file's `pooling_type` says so. Uses the context that answers use: no memory of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantize.errors import VerifyError
from quantize.runtimes.llama_cpp.model import BatchToken, OpenModel
from quantize.runtimes.served import Embedding

READ_TOKENS = 64  # of one step: llama.cpp makes logits for each of them too, and these take memory
MEAN, LAST = "mean", "last"
POOLING = {None: MEAN, "0": MEAN, "1": MEAN, "3": LAST}  # llama_pooling_type; the others need what a writer lacks


@dataclass
class _Text:
    tokens: list[int]
    done: int = 0
    total: Any = 0.0


class Readings:
    """The texts under way, by slot. pooling: None where the model makes no embeddings."""

    def __init__(self, model: OpenModel) -> None:
        self._model = model
        self._texts: dict[int, _Text] = {}
        architecture = model.metadata("general.architecture")
        self.pooling = POOLING.get(model.metadata(f"{architecture}.pooling_type"))

    def __contains__(self, slot: int) -> bool:
        return slot in self._texts

    def __bool__(self) -> bool:
        return bool(self._texts)

    def begin(self, slot: int, tokens: Sequence[int]) -> None:
        """Read these in a slot that is free."""
        self._model.forget_after(slot, 0)
        self._texts[slot] = _Text(list(tokens))

    def end(self, slot: int) -> None:
        """Give a slot back."""
        del self._texts[slot]
        self._model.forget_after(slot, 0)

    def step(self) -> dict[int, Embedding]:
        """Go on with the text that has the least left. Raises RuntimeError: llama.cpp can't run it."""
        slot, text = min(self._texts.items(), key=lambda item: len(item[1].tokens) - item[1].done)
        stop = min(len(text.tokens), text.done + min(READ_TOKENS, self._model.batch_tokens))
        rows = [BatchToken(text.tokens[place], place, slot, True) for place in range(text.done, stop)]
        try:
            found = self._model.decode_hidden(rows)
        except VerifyError as exc:
            raise RuntimeError(exc.message) from exc
        text.done = stop
        text.total = found[-1] if self.pooling == LAST else text.total + found.sum(0)
        return {slot: Embedding.of(text.total)} if stop == len(text.tokens) else {}
