"""mlx-lm as a ServedModel: each answer in turn, with a KV cache of its own.

In: a folder and how to serve it. Out: tokens for several sequences, a step at a time. Where mlx computes is its own
choice: Apple's GPU, which shares the computer's memory, or the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantize.model.folder_files import read_json
from quantize.runtimes.base import ModelRef
from quantize.runtimes.choosing import Answer, check_known, choose
from quantize.runtimes.devices import CPU
from quantize.runtimes.mlx.load import check_installed, computes_on_cpu, dequantized, load, to_torch
from quantize.runtimes.mlx.runtime import PROMPT_TOKENS, logits_of, new_cache
from quantize.runtimes.served import Chosen, Description, Progress, PromptTokens, Refused, Sampling, Serving
from quantize.runtimes.transformers.words import FolderWords

SUPPORTS = ("top_k", "min_p", "penalties", "repetition_penalty", "logprobs")


class MlxModel(FolderWords):
    """See ServedModel."""

    def __init__(self, runtime: str, model: ModelRef, serving: Serving, progress: Progress) -> None:
        check_installed(f"serving a {model.format} model")
        import torch

        if serving.device != CPU:
            text = f"mlx chooses by itself where it computes: --device {serving.device} is not for it"
            raise Refused(503, "no_gpu", f"{text}; leave it out")
        self._torch = torch
        super().__init__(model.folder)
        self._model = load(model.folder)
        if computes_on_cpu():
            self._model = dequantized(self._model)
        progress(1.0)
        self.end_with(read_json(model.folder / "generation_config.json").get("eos_token_id"))
        self._vocabulary = int(logits_of(self._model, [0], None).shape[-1])
        self._running: dict[int, Answer] = {}
        warnings = [warning] if (warning := self.warning()) else []
        self.description = Description(
            runtime, serving.context, serving.slots, CPU, SUPPORTS, {CPU: len(self._model.layers)}, warnings,
            self.tool_style(),
        )  # fmt: skip

    def begin(self, prompt: PromptTokens, sampling: Sampling) -> int:
        """See ServedModel."""
        check_known(prompt.tokens, self._vocabulary)
        slot = next(number for number in range(self.description.slots) if number not in self._running)
        self._running[slot] = Answer.to(list(prompt.tokens), sampling)
        self._running[slot].cache = new_cache(self._model)
        return slot

    def begin_embedding(self, tokens: Sequence[int]) -> int:
        """See ServedModel. mlx-lm's models give logits alone."""
        raise Refused(501, "not_supported", "an MLX model makes no embeddings here")

    def step(self) -> Mapping[int, Chosen]:
        """See ServedModel. Each answer goes one token on; a long prompt one part."""
        chosen: dict[int, Chosen] = {}
        for slot, item in self._running.items():
            stop = min(len(item.tokens), item.done + PROMPT_TOKENS)
            logits = logits_of(self._model, item.tokens[item.done : stop], item.cache)
            item.done = stop
            if item.done == len(item.tokens):
                chosen[slot] = choose(self._torch, item, to_torch(logits[-1]))
        return chosen

    def end(self, slot: int) -> None:
        """See ServedModel."""
        del self._running[slot]

    def memory(self) -> dict[str, Any]:
        """See ServedModel."""
        return {"gpu": None}
