"""SmoothQuant's scales: a few channels far above the others cost less once their range is shared."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.numerics.activations import round_to_int8
from quantize.numerics.awq import Reader, Tie
from quantize.numerics.gram import Gram
from quantize.numerics.rtn import round_to_nearest
from quantize.numerics.smooth import quantize_rows, search_smoothing

WIDTH, TOKENS = 64, 512


def inputs(outliers: float) -> Tensor:
    found = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    found[:, [5, 40]] *= outliers
    return found


def weight(seed: int = 1) -> Tensor:
    return torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(seed)) * 0.05


def error(x: Tensor, w: Tensor, scales: Tensor) -> float:
    """Of a W8A8 product with channels scaled: what the runtime computes, against the plain product."""
    rounded = round_to_nearest(w * scales, bits=8, group_size=WIDTH, symmetric=True).dequantize()
    return float((round_to_int8(x / scales) @ rounded.T - x @ w.T).square().sum())


def gram(x: Tensor) -> Gram:
    return Gram(x.T @ x, len(x))


def test_outliers_are_smoothed() -> None:
    x, w = inputs(60.0), weight()
    choice = search_smoothing([Reader(w, gram(x))])
    assert choice.ratio > 0
    assert error(x, w, choice.scales) < 0.35 * error(x, w, torch.ones(WIDTH))
    assert choice.loss < 0.35 * choice.nearest_loss


def test_what_is_even_is_left_nearly_as_it_is() -> None:
    x, w = inputs(1.0), weight()
    choice = search_smoothing([Reader(w, gram(x))])
    assert error(x, w, choice.scales) < 1.05 * error(x, w, torch.ones(WIDTH))


def test_the_estimate_is_near_what_a_product_loses() -> None:
    for outliers in (1.0, 8.0, 60.0):
        x, w = inputs(outliers), weight()
        choice = search_smoothing([Reader(w, gram(x))])
        assert 0.4 < choice.nearest_loss / error(x, w, torch.ones(WIDTH)) < 2.5
        assert 0.4 < choice.loss / error(x, w, choice.scales) < 2.5


def test_tied_channels_share_a_scale_and_readers_share_theirs() -> None:
    x = inputs(60.0)
    choice = search_smoothing([Reader(weight(1), gram(x)), Reader(weight(2), gram(x))], Tie(16, 2))
    runs = choice.scales.view(2, 2, 16)
    assert torch.equal(runs[:, 0], runs[:, 1])


def test_ties_hold_for_widths_that_no_vector_fills() -> None:
    """A power of equal numbers differs between the body and the tail of a vector."""
    x = torch.randn(TOKENS, 40, generator=torch.Generator().manual_seed(3))
    x[:, [1, 22]] *= 60
    w = torch.randn(24, 40, generator=torch.Generator().manual_seed(4)) * 0.05
    runs = search_smoothing([Reader(w, gram(x))], Tie(20, 2)).scales.view(1, 2, 20)
    assert torch.equal(runs[:, 0], runs[:, 1])


def test_rows_are_solved_under_the_scaled_gram_matrix() -> None:
    x, w = inputs(60.0), weight()
    scales = search_smoothing([Reader(w, gram(x))]).scales
    (solved,) = quantize_rows([w * scales], x.T @ x, scales, damping=0.01)
    assert (solved.quantized.bits, solved.quantized.group_size) == (8, WIDTH)
    off = (solved.quantized.dequantize() / scales - w) @ x.T
    assert abs(float(off.square().sum()) / solved.loss - 1) < 1e-2
