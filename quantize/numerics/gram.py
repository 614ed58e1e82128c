"""Gram matrices of a linear's inputs: all that GPTQ, AWQ and the importance matrix need to know of the data.

In: activations, a few thousand rows at a time. Out: Gram: XᵀX and the number of tokens.
Left to others: where the activations come from (activations), what is done with the statistics (gptq, awq, builders).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.numerics.constants import folded_shape
from quantize.numerics.precision import gram_products
from quantize.system.threads import without_gil

# The upper triangle in tiles: one product right of each diagonal tile, and inside of it one for each panel of columns.
# Narrow panels skip more of the lower half, wide products are faster. Measured with MKL; it changes no bit.
CPU_TILE, CPU_PANEL = 768, 96
CUDA_TILE = 2048


@dataclass(frozen=True)
class Gram:
    """Second moments of an input.

    matrix: XᵀX summed over tokens, [in, in] float32, symmetric; of guided statistics each token times its weight, which
    are 1 in the mean. tokens: rows of X that were summed. note: where they came from, when not from the linear's own
    input.
    """

    matrix: Tensor
    tokens: int
    note: str = ""

    def with_prior(self, prior: Gram, tokens: int) -> Gram:
        """Shrunk towards another input's: as if `tokens` tokens of `prior` had been seen beside its own.

        An estimate from few samples is better for being pulled towards one from many (Ledoit and Wolf 2004, "A
        well-conditioned estimator for large-dimensional covariance matrices"). Takes the matrix over.
        """
        matrix = self.matrix.add_(prior.matrix, alpha=tokens / prior.tokens)
        return Gram(matrix, self.tokens + tokens, self.note)


class GramAccumulator:
    """Sums XᵀX over batches, in the order in which they are added.

    Only tiles and panels of the upper triangle are multiplied (a blocked rank-k update, float32), little more than half
    of the full product. The summation order is fixed by the batches alone, so the same batches give the same bits.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self._matrix = torch.zeros(width, width, device=device)
        self._tokens = 0

    @property
    def _tile_and_panel(self) -> tuple[int, int]:
        return (CUDA_TILE, CUDA_TILE) if self._matrix.is_cuda else (CPU_TILE, CPU_PANEL)

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add rows x [..., in] of any floating type. weights: what each row counts, float32 [rows]; None: 1."""
        width = self._matrix.shape[0]
        rows = x.reshape(-1, width).float()
        if weights is not None:
            rows = rows * weights.sqrt()[:, None]
        if rows.shape[0] == 0:
            return
        with gram_products(self._matrix.device):
            without_gil(_add_tiles)(self._matrix, rows, *self._tile_and_panel)
        self._tokens += rows.shape[0]

    @classmethod
    def of(cls, matrix: Tensor, tokens: int) -> GramAccumulator:
        """One that has summed so much already, on another machine; the matrix becomes its own."""
        found = cls(0, matrix.device)
        found._matrix, found._tokens = matrix, tokens
        return found

    @property
    def matrix(self) -> Tensor:
        """The sums so far: the upper triangle, and some of what is below it. [in, in] float32."""
        return self._matrix

    def merge(self, other: GramAccumulator) -> GramAccumulator:
        """Add what another one has summed; it must not be used afterwards."""
        self._matrix += other._matrix
        self._tokens += other._tokens
        return self

    @property
    def tokens(self) -> int:
        """Rows added so far."""
        return self._tokens

    def finish(self, note: str = "") -> Gram:
        """Mirror the upper triangle and return the sums; the accumulator must not be used afterwards."""
        _, step = self._tile_and_panel
        return Gram(_mirror(self._matrix, step), self._tokens, note)


def fold(matrix: Tensor) -> Tensor:
    """A symmetric matrix [in, in] in half the space: [in / 2, in + 1], rounded up.

    A row of the upper triangle has its place beside the one that is as far from the end; where their number is odd, the
    one in the middle is alone in its row.
    """
    width = matrix.shape[0]
    rows = torch.zeros(folded_shape(width), dtype=matrix.dtype)
    for row in range(len(rows)):
        other = width - 1 - row
        rows[row, : width - row] = matrix[row, row:]
        if other != row:
            rows[row, width - row :] = matrix[other, other:]
    return rows


def unfold(rows: Tensor) -> Tensor:
    """The inverse of `fold`."""
    width = rows.shape[1] - 1
    matrix = rows.new_zeros(width, width)
    for row in range(len(rows)):
        other = width - 1 - row
        matrix[row, row:] = rows[row, : width - row]
        if other != row:
            matrix[other, other:] = rows[row, width - row :]
    return _mirror(matrix, CPU_PANEL)


def _mirror(matrix: Tensor, step: int) -> Tensor:
    """Have what is above the diagonal below it too."""
    width = matrix.shape[0]
    for start in range(0, width, step):
        stop = min(start + step, width)
        square = matrix[start:stop, start:stop]
        square.copy_(torch.triu(square) + torch.triu(square, 1).T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
    return matrix


def _add_tiles(matrix: Tensor, rows: Tensor, tile: int, panel: int) -> None:
    """Add rowsᵀ rows to the upper triangle."""
    width = matrix.shape[0]
    for start in range(0, width, tile):
        stop = min(start + tile, width)
        if stop < width:
            matrix[start:stop, stop:].addmm_(rows[:, start:stop].t(), rows[:, stop:])
        for left in range(start, stop, panel):
            right = min(left + panel, stop)
            matrix[left:right, left:stop].addmm_(rows[:, left:right].t(), rows[:, left:stop])
