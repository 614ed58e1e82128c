"""Error feedback into llama.cpp's grids: against its own rounding of the same matrix, read by the gguf package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.errors import BuildError
from quantize.numerics.gptq import row_losses
from quantize.numerics.grid_solver import SOLVED_ROWS, block_order, collect, factor_for, row_tasks, solve_rows
from quantize.numerics.kquants import GRIDS
from tests.numerics.llama_blocks import Array, rounded, values

KINDS = sorted(GRIDS)


def problem(seed: int, out: int = 12, width: int = 512, tokens: int = 700) -> tuple[Tensor, Tensor]:
    """A weight as a 16-bit file has it, and the Gram matrix of correlated inputs with outlier channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    x = torch.randn(tokens, width, generator=generator) @ mix
    x[:, :: width // 5] *= 6
    return (torch.randn(out, width, generator=generator) * 0.1).half().float(), x.T @ x


def llama(kind: str, weight: Tensor, gram: Tensor) -> Array:
    return rounded(kind, weight.numpy(), gram.diagonal().numpy())


def losses(kind: str, data: Array, weight: Tensor, gram: Tensor) -> Tensor:
    """Of each row, in double precision, from what the gguf package reads."""
    return row_losses(torch.from_numpy(values(kind, data)).double() - weight.double(), gram.double())


@given(st.sampled_from(KINDS), st.integers(0, 2**32 - 1), st.integers(1, 900), st.sampled_from([1e-3, 1.0, 50.0]))
@settings(max_examples=40, deadline=None)
def test_no_row_is_worse_than_llama_cpp_made_it(kind: str, seed: int, tokens: int, size: float) -> None:
    weight, gram = problem(seed, out=4, tokens=tokens)
    weight *= size
    data = llama(kind, weight, gram)
    solved = solve_rows(weight, factor_for(gram, GRIDS[kind]), GRIDS[kind], data)
    ours, theirs = losses(kind, solved.data, weight, gram), losses(kind, data, weight, gram)
    errors = (torch.from_numpy(values(kind, found)) - weight for found in (data, solved.data))
    terms = max(float(row_losses(error.abs(), gram.abs()).max()) for error in errors)
    noise = 1e-5 * terms  # of sums in single precision: with few tokens their terms cancel
    assert solved.data.shape == data.shape
    assert bool((ours <= theirs * (1 + 1e-3) + noise).all())
    assert solved.figures[0] == pytest.approx(ours.numpy(), rel=1e-2, abs=noise)
    assert solved.figures[1] == pytest.approx(theirs.numpy(), rel=1e-2, abs=noise)


@pytest.mark.parametrize("kind", KINDS)
def test_correlated_inputs_lose_much_less(kind: str) -> None:
    weight, gram = problem(3, out=48)
    data = llama(kind, weight, gram)
    solved = solve_rows(weight, factor_for(gram, GRIDS[kind]), GRIDS[kind], data)
    assert not solved.figures[2].any()
    ratio = float(losses(kind, solved.data, weight, gram).sum() / losses(kind, data, weight, gram).sum())
    assert ratio < 0.6


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q5_1"])
def test_rows_do_not_depend_on_one_another(kind: str) -> None:
    weight, gram = problem(1, out=SOLVED_ROWS + 3, width=256)
    data, factor = llama(kind, weight, gram), factor_for(gram, GRIDS[kind])
    together = collect([task() for task in row_tasks(weight, factor, GRIDS[kind], data)])
    alone = solve_rows(weight[SOLVED_ROWS:], factor, GRIDS[kind], data[SOLVED_ROWS:])
    assert np.array_equal(together.data[SOLVED_ROWS:], alone.data)
    assert together.figures.shape == (3, len(weight))


@pytest.mark.parametrize("kind", KINDS)
def test_without_data_or_weights_the_bytes_stay(kind: str) -> None:
    weight, gram = problem(2, out=4)
    weight[1] = 0
    data = llama(kind, weight, gram)
    nothing = solve_rows(weight, factor_for(torch.zeros_like(gram), GRIDS[kind]), GRIDS[kind], data)
    assert np.array_equal(nothing.data, data)
    assert nothing.figures[2].all()
    solved = solve_rows(weight, factor_for(gram, GRIDS[kind]), GRIDS[kind], data)
    assert not values(kind, solved.data)[1].any()


@given(st.sampled_from(KINDS), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_columns_are_visited_with_blocks_whole(kind: str, seed: int) -> None:
    grid = GRIDS[kind]
    diagonal = torch.rand(1024, generator=torch.Generator().manual_seed(seed))
    order = block_order(diagonal, grid)
    assert order.sort().values.tolist() == list(range(1024))
    for size in (grid.block, grid.sub):
        parts = order.view(-1, size)
        assert bool((parts // size == parts[:, :1] // size).all())
    blocks = diagonal[order].view(-1, grid.block)
    assert bool((blocks.sum(1).diff() <= 1e-4).all())
    assert bool((blocks.view(len(blocks), -1, grid.sub).sum(2).diff(dim=1) <= 1e-4).all())
    assert bool((diagonal[order].view(-1, grid.sub).diff(dim=1) <= 0).all())


def test_statistics_that_overflowed_are_refused() -> None:
    with pytest.raises(BuildError, match="not finite"):
        factor_for(torch.full((256, 256), float("inf")), GRIDS["Q4_K"])
