"""transformers as a Runtime: whatever its kind loads.

In: a model and token ids. Out: log-probabilities and greedy answers. No code of the model's
own is run. Import it in a worker: gptqmodel patches other libraries and reads the environment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from quantize.runtimes.base import ModelRef, OneWindowAtATime, Prompted, block_rows, goes_on, in_groups, log_softmax
from quantize.runtimes.transformers.load import TransformersLoader, kernels

if TYPE_CHECKING:
    from quantize.runtimes.base import LogProbs

BATCH_REQUESTS = 32
BATCH_TOKENS = 4096  # prompts of one batch, padding included: keeps prefill memory flat


class TransformersRuntime(OneWindowAtATime):
    """A model in transformers, on one device."""

    def __init__(
        self, loader: TransformersLoader, model: ModelRef, version: str, threads: int = 0, device: str = "cpu"
    ) -> None:
        torch = loader.import_torch(f"evaluating a {model.format} model")
        self._label = model.folder.name
        if threads:
            torch.set_num_threads(threads)
        self._torch = torch
        self._device = device
        self._model, self.warnings = loader.load(model, self._device)
        self.name, self.version = loader.name, ", ".join([version, *filter(None, [kernels(self._model)])])
        self.vocabulary = int(self._model.get_output_embeddings().weight.shape[0])

    def log_probs(self, window: Sequence[int]) -> Iterator[LogProbs]:
        """See Runtime; a window longer than a block goes through in pieces, over one KV cache."""
        torch, rows, cache = self._torch, block_rows(self.vocabulary), None
        last = len(window) - 1
        for start in range(0, last, rows):
            ids = torch.tensor([list(window[start : min(start + rows, last)])], device=self._device)
            with torch.inference_mode():
                output = self._model(input_ids=ids, past_key_values=cache, use_cache=last > rows)
            cache = output.past_key_values if last > rows else None
            yield log_softmax(output.logits[0], self._label)

    def answer(self, requests: Sequence[Prompted]) -> list[list[int]]:
        """See Runtime; prompts of like length go together, padded on the left."""
        answers: dict[int, list[int]] = {}
        for members in in_groups(requests, _fit):
            answers.update(self._answer_batch(members, requests))
        return [answers[index] for index in range(len(requests))]

    def _answer_batch(self, members: list[int], requests: Sequence[Prompted]) -> dict[int, list[int]]:
        torch = self._torch
        width = max(len(requests[index].token_ids) for index in members)
        pads = [width - len(requests[index].token_ids) for index in members]
        rows = [[0] * pad + list(requests[i].token_ids) for pad, i in zip(pads, members, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in pads]
        step = torch.tensor(rows, device=self._device)
        attention = torch.tensor(mask, device=self._device)
        positions = (attention.cumsum(-1) - 1).clamp(min=0)
        chosen: dict[int, list[int]] = {index: [] for index in members}
        cache = None
        while members:
            with torch.inference_mode():
                output = self._model(
                    input_ids=step, attention_mask=attention, position_ids=positions,
                    past_key_values=cache, use_cache=True, logits_to_keep=1,
                )  # fmt: skip
            cache = output.past_key_values
            tokens = output.logits[:, -1].argmax(-1)
            rows_left = [
                row for row, (index, token) in enumerate(zip(members, tokens.tolist(), strict=True))
                if goes_on(requests[index], chosen[index], token)
            ]  # fmt: skip
            step, positions = tokens[:, None], positions[:, -1:] + 1
            attention = torch.cat([attention, attention.new_ones((len(members), 1))], dim=1)
            if rows_left and len(rows_left) < len(members):  # answers that are done cost nothing from here on
                keep = torch.tensor(rows_left, device=self._device)
                step, positions, attention = step[keep], positions[keep], attention[keep]
                cache.batch_select_indices(keep)
            members = [members[row] for row in rows_left]
        return chosen

    def close(self) -> None:
        """See Runtime."""
        self._model = None


def _fit(requests: Sequence[Prompted]) -> bool:
    """Whether so many can be padded to the last one's prompt, which is the longest."""
    return len(requests) <= BATCH_REQUESTS and len(requests[-1].token_ids) * len(requests) <= BATCH_TOKENS
