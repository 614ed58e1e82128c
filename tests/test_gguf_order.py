"""A matrix of a GGUF file in the source's order: found by its rows or columns, and only where they are the source's."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.formats.gguf.weights import in_source_order


def drawn(seed: int, out: int, width: int) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([0, 1]), st.integers(2, 96))
def test_moved_rows_or_columns_are_put_back(seed: int, axis: int, moved: int) -> None:
    source = drawn(seed, 96, 96)
    noisy = source + 0.3 * drawn(seed + 1, 96, 96)
    places = torch.arange(96)
    part = torch.randperm(96, generator=torch.Generator().manual_seed(seed + 2))[:moved]
    places[part] = places[part.roll(1)]
    assert torch.equal(in_source_order(noisy.index_select(axis, places), source), noisy)


def test_another_matrix_stays_as_it_is() -> None:
    source, other = drawn(0, 64, 96), drawn(1, 64, 96)
    assert torch.equal(in_source_order(other, source), other)
    assert torch.equal(in_source_order(source, source), source)


def test_rows_that_are_nothing_stay_in_their_place() -> None:
    source = drawn(0, 64, 96)
    source[10:20] = 0
    assert torch.equal(in_source_order(source, source), source)
