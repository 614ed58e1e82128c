"""Answers that go on a token at a time in one forward pass: a step reads all weights, for many answers as for one.

In: a model, and for each answer the KV cache of its prompt. Out: the logits of each answer's next token. Caches are
joined into one, padded on the left; where a kind of layer keeps anything else than keys and values of all tokens
(sliding windows, states), the answers can't go together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Together:
    """Answers by their slots, over one KV cache. pads: tokens that are missing on the left of each."""

    def __init__(self, torch: Any, model: Any) -> None:
        self._torch, self._model = torch, model
        self._slots: list[int] = []
        self._pads: list[int] = []
        self._cache: Any = None

    def __contains__(self, slot: int) -> bool:
        return slot in self._slots

    def takes(self, cache: Any) -> bool:
        """Whether a cache is of keys and values of all tokens, in every layer."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        return type(cache) is DynamicCache and all(
            type(layer) is DynamicLayer and layer.get_seq_length() for layer in cache.layers
        )

    def join(self, slot: int, cache: Any) -> None:
        """Take one more answer, with the cache of all its tokens but the last; it belongs to this object then."""
        if self._cache is None:
            self._cache, self._slots, self._pads = cache, [slot], [0]
            return
        mine, more = self._length, int(cache.get_seq_length())
        length = max(mine, more)
        for layer, other in zip(self._cache.layers, cache.layers, strict=True):
            layer.keys = self._joined(layer.keys, other.keys, length)
            layer.values = self._joined(layer.values, other.values, length)
        self._pads = [pad + length - mine for pad in self._pads] + [length - more]
        self._slots.append(slot)

    def leave(self, slot: int) -> None:
        """Let an answer go, with what was padded for it alone."""
        left = [row for row, other in enumerate(self._slots) if other != slot]
        self._slots, self._pads = [self._slots[row] for row in left], [self._pads[row] for row in left]
        if not left:
            self._cache = None
            return
        spare = min(self._pads)
        rows = self._torch.tensor(left).to(self._model.device)
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[rows, :, spare:], layer.values[rows, :, spare:]
        self._pads = [pad - spare for pad in self._pads]

    def step(self, tokens: Mapping[int, int]) -> dict[int, Any]:
        """Logits [vocabulary] after one more token of each answer."""
        torch, length = self._torch, self._length
        if not self._slots:
            return {}
        seen = torch.arange(length + 1) >= torch.tensor(self._pads)[:, None]
        places = torch.tensor([[length - pad] for pad in self._pads])
        ids = torch.tensor([[tokens[slot]] for slot in self._slots])
        ids, seen, places = (part.to(self._model.device) for part in (ids, seen.long(), places))
        with torch.inference_mode():
            output = self._model(
                input_ids=ids, attention_mask=seen, position_ids=places, past_key_values=self._cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
        self._cache = output.past_key_values
        return dict(zip(self._slots, output.logits[:, -1], strict=True))

    @property
    def _length(self) -> int:
        """Tokens that the cache has, padding included."""
        return 0 if self._cache is None else int(self._cache.get_seq_length())

    def _joined(self, one: Any, other: Any, length: int) -> Any:
        pad = self._torch.nn.functional.pad
        rows = [pad(part, (0, 0, length - part.shape[-2], 0)) for part in (one, other)]
        return self._torch.cat(rows)
