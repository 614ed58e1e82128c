"""GPTQ under its own Gram matrix: against rounding to nearest, against the textbook loop, and on hopeless inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.errors import BuildError
from quantize.numerics import gptq
from quantize.numerics.gptq import REPORT_ROWS, estimated_loss, factorize, group_order, row_losses, solve
from quantize.numerics.rtn import round_to_nearest

seeds = st.integers(0, 2**32 - 1)


def problem(seed: int, out: int = 12, width: int = 96, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs with outlier channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    x = torch.randn(tokens, width, generator=generator) @ mix
    x[:, :: width // 5] *= 12
    return torch.randn(out, width, generator=generator) * 0.1, x.T @ x


@given(seeds, st.sampled_from([2, 3, 4, 8]), st.booleans(), st.sampled_from([16, 32, 96]), st.integers(3, 300))
@settings(max_examples=60)
def test_no_row_is_worse_than_rounded_to_nearest(
    seed: int, bits: int, symmetric: bool, group_size: int, tokens: int
) -> None:
    weight, gram = problem(seed, tokens=tokens)
    (solution,) = solve([weight], factorize(gram, group_size), bits=bits, symmetric=symmetric)
    nearest = round_to_nearest(weight, bits=bits, group_size=group_size, symmetric=symmetric, smallest_zero=1)
    ours = row_losses((solution.quantized.dequantize() - weight).double(), gram.double())
    theirs = row_losses((nearest.dequantize() - weight).double(), gram.double())
    assert bool((ours <= theirs * (1 + 1e-3) + 1e-6).all())
    assert solution.loss == pytest.approx(float(ours.sum()), rel=1e-2, abs=1e-5)
    assert solution.nearest_loss == pytest.approx(float(theirs.sum()), rel=1e-2, abs=1e-5)
    assert int(solution.quantized.codes.max()) < 2**bits
    assert int(solution.quantized.zeros.min()) >= 1


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_correlated_inputs_lose_much_less(bits: int) -> None:
    weight, gram = problem(3, out=64)
    (solution,) = solve([weight], factorize(gram, 32), bits=bits)
    assert solution.loss < 0.6 * solution.nearest_loss
    assert solution.fallback_rows == 0


def test_feedback_equals_that_of_the_inverse_cholesky_factor() -> None:
    """GPTQ's own recursion, W[:, j:] -= err U[j, j:] / U[j, j] with H⁻¹ = UᵀU, gives the same codes."""
    weight, gram = problem(5, out=32)
    factor = factorize(gram.double().float(), 32)
    quantized = solve([weight], factor, bits=4)[0].quantized
    damped = gram.double() + torch.eye(96, dtype=torch.float64) * factor.damping * gram.double().diagonal().mean()
    order = factor.order
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    work = weight.double()[:, order].clone()
    scales = quantized.scales.double().repeat_interleave(32, 1)[:, order]
    codes = torch.empty_like(work)
    for column in range(96):
        codes[:, column] = (work[:, column] / scales[:, column]).round().clamp(-8, 7)
        error = (work[:, column] - codes[:, column] * scales[:, column]) / upper[column, column]
        work[:, column:] -= error[:, None] * upper[column, column:]
    assert float((codes + 8 == quantized.codes[:, order]).double().mean()) > 0.995


def test_linears_that_share_an_input_do_not_change_each_other() -> None:
    weight, gram = problem(1, out=24)
    factor = factorize(gram, 32)
    together = solve([weight[:8], weight[8:]], factor, bits=4)
    for part, rows in zip(together, (weight[:8], weight[8:]), strict=True):
        (alone,) = solve([rows], factor, bits=4)
        assert torch.equal(alone.quantized.codes, part.quantized.codes)
        assert torch.equal(alone.quantized.scales, part.quantized.scales)


def test_solving_rows_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(2, out=40)
    factor = factorize(gram, 32)
    whole = solve([weight], factor, bits=4)[0].quantized
    monkeypatch.setattr(gptq, "SOLVED_ROWS", 16)
    assert torch.equal(solve([weight], factor, bits=4)[0].quantized.codes, whole.codes)


def test_order_keeps_groups_whole() -> None:
    diagonal = torch.rand(96, generator=torch.Generator().manual_seed(0))
    order = group_order(diagonal, 32).view(3, 32)
    assert sorted(order.reshape(-1).tolist()) == list(range(96))
    assert all(len(set((row // 32).tolist())) == 1 for row in order)
    assert all(bool((diagonal[row].diff() <= 0).all()) for row in order)
    assert bool((diagonal[order].sum(1).diff() <= 0).all())


def test_damping_rises_until_it_is_enough_and_says_so() -> None:
    gram = torch.eye(64)
    gram[0, 1] = gram[1, 0] = 1.5  # indefinite: no Gram matrix, but what rounding can make of one
    factor = factorize(gram, 32)
    assert factor.damping > gptq.DAMPING
    assert factorize(torch.eye(64), 32).damping == gptq.DAMPING


def test_no_data_means_rounding_to_nearest_is_not_beaten_but_works() -> None:
    weight, _ = problem(0, width=64)
    factor = factorize(torch.zeros(64, 64), 32)
    assert factor.damping == float("inf")
    (solution,) = solve([weight], factor, bits=4)
    assert bool(torch.isfinite(solution.quantized.dequantize()).all())
    assert float((solution.quantized.dequantize() - weight).abs().max()) < 0.1


def test_dead_channels_are_rounded() -> None:
    weight, gram = problem(0)
    gram[7], gram[:, 7] = 0, 0
    (solution,) = solve([weight], factorize(gram, 32), bits=4)
    assert bool(torch.isfinite(solution.quantized.dequantize()).all())


def test_overflowed_statistics_are_refused() -> None:
    gram = torch.eye(64)
    gram[3, 3] = float("inf")
    with pytest.raises(BuildError, match="not finite"):
        factorize(gram, 32)


def test_the_estimated_loss_is_exact_for_few_rows_and_close_for_many() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(256, 64)
    gram = inputs.T @ inputs
    for rows, tolerance in ((1, 1e-5), (REPORT_ROWS, 1e-5), (5000, 0.05)):
        error = torch.randn(rows, 64)
        assert estimated_loss(error, gram) == pytest.approx(float((error @ inputs.T).square().sum()), rel=tolerance)
