"""What the two matrices as long as the vocabulary must get right: the output head, and the token embedding.

In: of guided statistics, what the head reads and the gradients in its products; the gradients where the embedding comes
out. Out: sums on disk beside the tokens' weights, and VocabularyStatistics of all of them. The head is a linear, with a
Gram matrix and weights of its outputs like any other. A row of the embedding counts by how often its token comes, and
its channels by the mean square gradient there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.numerics.guidance import raw_weights, squares_by_output, sum_of_squares

GRAM, WEIGHTS, OUTPUTS, COUNTS, LENGTHS, CHANNELS = (
    f"vocabulary.{name}" for name in ("gram", "weights", "outputs", "counts", "lengths", "channels")
)


def is_of_vocabulary(name: str) -> bool:
    """Whether a tensor of a table is one of these sums."""
    return name.startswith("vocabulary.")


@dataclass(frozen=True)
class VocabularyStatistics:
    """gram: of the head's input, each token weighted as in any other, float32 [in, in]. outputs: how much each of its
    outputs matters, float32 [vocabulary], as TokenWeights.outputs has it. counts: how often each token is read, int64
    [vocabulary]. channels: how much each channel of the embedding matters, float32 [hidden]. length: the mean of the
    squared length of what the first block reads.
    """

    gram: Tensor
    outputs: Tensor
    counts: Tensor
    channels: Tensor
    length: float

    @classmethod
    def of(cls, parts: Sequence[Mapping[str, Tensor]]) -> VocabularyStatistics:
        """From the sums of all shares of the text."""
        gram, weights, outputs, lengths, channels = (
            torch.stack([part[name] for part in parts]).sum(0) for name in (GRAM, WEIGHTS, OUTPUTS, LENGTHS, CHANNELS)
        )
        counts = torch.zeros(len(outputs), dtype=torch.int64)
        for part in parts:  # each as long as its largest token
            found = part[COUNTS][: len(counts)]
            counts[: len(found)] += found
        tokens = int(counts.sum())
        mean = float(weights) / tokens or 1.0
        return cls(
            (gram / mean).float(), (outputs / tokens**2).float(), counts, (channels / tokens**2).float(),
            float(lengths) / tokens,
        )  # fmt: skip


class HeadSums:
    """Sums over tokens as a head is gone back through."""

    def __init__(self, width: int, vocabulary: int, device: torch.device) -> None:
        self._gram = torch.zeros(width, width, device=device, dtype=torch.float64)
        self._weights = torch.zeros((), device=device, dtype=torch.float64)
        self._outputs = torch.zeros(vocabulary, device=device, dtype=torch.float64)

    def add(self, states: Tensor, gradient: Tensor) -> None:
        """What the head reads [.., rows, in], and the gradient in its products [.., rows, vocabulary]."""
        read, weights = states.reshape(-1, states.shape[-1]).float(), raw_weights(sum_of_squares(gradient))
        self._gram += ((read * weights[:, None]).T @ read).double()
        self._weights += weights.double().sum()
        self._outputs += squares_by_output(gradient)

    def tensors(self) -> dict[str, Tensor]:
        """The sums, for a file."""
        return {GRAM: self._gram.cpu(), WEIGHTS: self._weights.cpu(), OUTPUTS: self._outputs.cpu()}


class EmbeddingSums:
    """Sums over tokens where the embedding comes out."""

    def __init__(self, sequences: Sequence[Tensor]) -> None:
        self._counts = torch.bincount(torch.cat([ids.reshape(-1) for ids in sequences]))
        self._lengths = torch.zeros((), dtype=torch.float64)
        self._channels: Tensor | None = None

    def add(self, states: Tensor, gradient: Tensor) -> None:
        """What the first block reads and the gradient there, both [.., hidden]."""
        self._lengths += states.float().square().sum().double().cpu()
        sums = squares_by_output(gradient).cpu()
        self._channels = sums if self._channels is None else self._channels + sums

    def tensors(self) -> dict[str, Tensor]:
        """The sums, for a file."""
        assert self._channels is not None
        return {COUNTS: self._counts, LENGTHS: self._lengths, CHANNELS: self._channels}
