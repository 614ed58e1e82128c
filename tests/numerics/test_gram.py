"""Gram matrices: the sums, and their order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.numerics.constants import folded_shape
from quantize.numerics.gram import Gram, GramAccumulator, fold, unfold


@given(st.integers(0, 2**32 - 1), st.integers(1, 450), st.lists(st.integers(0, 40), min_size=1, max_size=4))
@settings(max_examples=20)
def test_sums_of_batches_equal_the_whole(seed: int, width: int, sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(size, width, generator=generator) for size in sizes]
    accumulator = GramAccumulator(width)
    for batch in batches:
        accumulator.add(batch)
    whole = torch.cat(batches).double()
    gram = accumulator.finish("why")
    assert (gram.tokens, gram.note) == (len(whole), "why")
    assert torch.equal(gram.matrix, gram.matrix.T)
    torch.testing.assert_close(gram.matrix.double(), whole.T @ whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [64, 576, 1000])
def test_thread_count_changes_no_bit(width: int) -> None:
    x = torch.randn(777, width, generator=torch.Generator().manual_seed(0))
    found: list[Gram] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            accumulator = GramAccumulator(width)
            accumulator.add(x)
            accumulator.add(x * 2)
            found.append(accumulator.finish())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].matrix, found[1].matrix)


def test_leading_axes_are_tokens() -> None:
    accumulator = GramAccumulator(8)
    accumulator.add(torch.ones(2, 3, 8, dtype=torch.bfloat16))
    assert accumulator.tokens == 6
    assert bool((accumulator.finish().matrix == 6).all())


@given(st.integers(0, 2**32 - 1), st.integers(1, 260))
@settings(max_examples=30)
def test_a_folded_matrix_takes_half_the_space_and_nothing_is_lost(seed: int, width: int) -> None:
    half = torch.randn(width, width, generator=torch.Generator().manual_seed(seed))
    matrix = half + half.T
    folded = fold(matrix)
    assert tuple(folded.shape) == folded_shape(width)
    assert folded.numel() <= (width * width + 2 * width + 1) / 2
    assert torch.equal(unfold(folded), matrix)
