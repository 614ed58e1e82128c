"""mlx-lm as a Runtime: the models that it knows, on whatever mlx computes on.

In: a folder and token ids. Out: log-probabilities and greedy answers. Import it in a worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from quantize.runtimes.base import ModelRef, OneWindowAtATime, Prompted, block_rows, goes_on, log_softmax
from quantize.runtimes.mlx.load import check_installed, computes_on_cpu, dequantized, load, to_torch

if TYPE_CHECKING:
    from quantize.runtimes.base import LogProbs

PROMPT_TOKENS = 512  # of a prompt, read at once


class MlxRuntime(OneWindowAtATime):
    """A model in mlx-lm."""

    def __init__(self, model: ModelRef, name: str, version: str, threads: int = 0) -> None:
        check_installed(f"evaluating a {model.format} model")
        import torch

        self.name, self.version = name, version
        self.warnings: tuple[str, ...] = ()
        if threads:
            torch.set_num_threads(threads)
        self._label, self._model = model.folder.name, load(model.folder)
        if computes_on_cpu():
            self._model = dequantized(self._model)
        self.vocabulary = int(logits_of(self._model, [0], None).shape[-1])

    def log_probs(self, window: Sequence[int]) -> Iterator[LogProbs]:
        """See Runtime; a window longer than a block goes through in pieces, over one KV cache."""
        rows, cache, last = block_rows(self.vocabulary), new_cache(self._model), len(window) - 1
        for start in range(0, last, rows):
            logits = logits_of(self._model, window[start : min(start + rows, last)], cache)
            yield log_softmax(to_torch(logits), self._label)

    def answer(self, requests: Sequence[Prompted]) -> list[list[int]]:
        """See Runtime; one after the other."""
        return [_answer(self._model, request) for request in requests]

    def close(self) -> None:
        """See Runtime."""
        self._model = None


def answer_greedily(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """So many tokens that follow a prompt."""
    return _answer(model, Prompted(tuple(prompt), tokens))


def _answer(model: Any, request: Prompted) -> list[int]:
    cache, chosen, ids = new_cache(model), list[int](), request.token_ids
    logits: Any = None
    for start in range(0, len(ids), PROMPT_TOKENS):
        logits = logits_of(model, ids[start : start + PROMPT_TOKENS], cache)
    token = int(logits[-1].argmax())
    while goes_on(request, chosen, token):
        token = int(logits_of(model, [token], cache)[-1].argmax())
    return chosen


def new_cache(model: Any) -> Any:
    """For one sequence."""
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(model)


def logits_of(model: Any, ids: Sequence[int], cache: Any) -> Any:
    """[tokens, vocabulary], computed."""
    import mlx.core as mx

    logits = model(mx.array([list(ids)]), cache=cache)[0]
    mx.eval(logits)
    return logits
