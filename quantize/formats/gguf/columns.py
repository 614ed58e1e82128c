"""Which channel of a linear's input each column of its matrix in a GGUF file belongs to.

In: the matrix as it is in the 16-bit file, and as it is in the source. Out: the order of its columns. Rows may be in
any order, as the converter puts the rows of some models into another one: a column is known by its sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROWS_AT_ONCE = 4096
NEAR = 2.0**-7  # of a column's size: what is left between two roundings to 16 bits
EXACT = 1e-9  # the order in which doubles are added


def column_order(found: Tensor, source: Tensor) -> tuple[int, ...] | None:
    """For each column of `found` the column of `source` that it is; () where each is in its place.

    None where they are not the same columns: split, merged with others, scaled. Both [out, in], of any floating type.
    """
    if found.shape != source.shape:
        return None
    here, there = _sums(found), _sums(source)
    if _alike(here, there, NEAR):
        return ()
    one, other = here[1].argsort(stable=True), there[1].argsort(stable=True)
    if not _alike(here[:, one], there[:, other], EXACT):
        return None
    order = one.new_empty(len(one)).index_copy_(0, one, other)
    return tuple(order.tolist())


def _sums(matrix: Tensor) -> torch.Tensor:
    """Of each column the sum, the sum of squares and that of magnitudes; float64 [3, in]."""
    import torch

    total = torch.zeros(3, matrix.shape[1], dtype=torch.float64)
    for part in torch.split(matrix, ROWS_AT_ONCE):
        values = part.double()
        total += torch.stack((values.sum(0), values.square().sum(0), values.abs().sum(0)))
    return total


def _alike(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether all sums are the same but for a share of the column's size."""
    near = (one - other).abs()
    return bool((near[0] <= tolerance * one[2]).all() and (near[1:] <= tolerance * one[1:]).all())
