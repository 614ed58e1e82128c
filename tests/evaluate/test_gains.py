"""Groups of weights against the source's, where scales are folded into rows and columns: by known factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantize.evaluate.pairs import Pair
from quantize.evaluate.structure import GAINS_FEWER_BITS, _gains

GROUP = 64


def folded(factor: float = 1.0) -> Tensor:
    """The gains of a matrix whose rows and columns have scales far apart, as in models with outliers.

    factor: of one group of it.
    """
    made = torch.Generator().manual_seed(0)
    source = torch.randn(256, 8 * GROUP, generator=made)
    rows, columns = (torch.exp(2 * torch.randn(count, generator=made)) for count in source.shape)
    rows[17], columns[:GROUP] = rows.max(), columns.square().mean().sqrt()  # a group of weight, and not all of its row
    artifact = source * rows[:, None] * columns
    artifact[17, :GROUP] *= factor
    return _gains(Pair("x", artifact, source), GROUP, folded=True)


def test_scales_of_rows_and_columns_are_no_fault() -> None:
    gains = folded()
    assert 0.9 < float(gains.min()) <= float(gains.max()) < 1.1


@pytest.mark.parametrize("factor", [0.1, 8.0])
def test_a_group_with_another_scale_is(factor: float) -> None:
    low, high = GAINS_FEWER_BITS
    gains = folded(factor)
    assert bool((gains < low).any()) == (factor < 1)
    assert bool((gains > high).any()) == (factor > 1)
