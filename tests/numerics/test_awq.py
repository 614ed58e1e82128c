"""AWQ's search: at ratio 0 it is rounding to nearest, it never loses to it, and it finds what hurts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.errors import BuildError
from quantize.numerics.awq import (
    Reader,
    Tie,
    channel_scales,
    quantize_compensated,
    quantize_scaled,
    search_scales,
)
from quantize.numerics.gptq import row_losses
from quantize.numerics.gram import Gram
from quantize.numerics.rtn import round_to_nearest

seeds = st.integers(0, 2**32 - 1)


def problem(seed: int, out: int = 24, width: int = 64, tokens: int = 300) -> Reader:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    x[:, :: width // 4] *= 30
    weight = torch.randn(out, width, generator=generator) * 0.1
    return Reader(weight, Gram(x.T @ x, tokens))


@given(seeds, st.sampled_from([16, 32, 64]))
@settings(max_examples=30)
def test_ratio_zero_is_rounding_to_nearest(seed: int, group_size: int) -> None:
    reader = problem(seed)
    choice = search_scales([reader], group_size=group_size, ratios=(0.0,))
    assert choice.ratio == 0
    assert torch.equal(choice.scales, torch.ones(64))
    (found,) = quantize_scaled(
        [reader.weight * choice.scales], reader.gram.matrix.diagonal(), choice.scales, group_size=group_size, clip=False
    )
    nearest = round_to_nearest(reader.weight, bits=4, group_size=group_size, symmetric=False)
    assert torch.equal(found.codes, nearest.codes)
    assert torch.equal(found.dequantize(), nearest.dequantize())


@given(seeds)
@settings(max_examples=20)
def test_the_choice_loses_no_more_than_rounding_and_says_how_much(seed: int) -> None:
    reader = problem(seed)
    choice = search_scales([reader], group_size=32)
    assert choice.loss <= choice.nearest_loss
    (found,) = quantize_scaled(
        [reader.weight * choice.scales], reader.gram.matrix.diagonal(), choice.scales, group_size=32, clip=False
    )
    loss = row_losses(found.dequantize() / choice.scales - reader.weight, reader.gram.matrix).sum()
    assert choice.loss == pytest.approx(float(loss), rel=1e-3)


def test_outlier_channels_are_protected_and_clipping_helps() -> None:
    reader = problem(0, out=96)
    choice = search_scales([reader], group_size=32)
    assert choice.ratio > 0
    assert choice.loss < 0.5 * choice.nearest_loss
    assert bool((choice.scales[::16] > choice.scales[1::16]).all())
    weights, energy = [reader.weight * choice.scales], reader.gram.matrix.diagonal()
    losses = []
    for clip in (False, True):
        (found,) = quantize_scaled(weights, energy, choice.scales, group_size=32, clip=clip)
        losses.append(float(row_losses(found.dequantize() / choice.scales - reader.weight, reader.gram.matrix).sum()))
    assert losses[1] < losses[0]


def test_the_search_takes_what_the_cost_model_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many points, and of a tall weight so many rows."""
    from quantize.build.spread.cost import AWQ_POINTS
    from quantize.numerics import awq
    from quantize.numerics.constants import SEARCHED_ROWS

    seen: list[int] = []
    real = awq._rounding_loss

    def count(rows: Tensor, *others: Any) -> float:
        seen.append(len(rows))
        return real(rows, *others)

    monkeypatch.setattr(awq, "_rounding_loss", count)
    search_scales([problem(0, out=2 * SEARCHED_ROWS)], group_size=32)
    assert set(seen) == {SEARCHED_ROWS}
    assert AWQ_POINTS - len(awq.REFINEMENT) <= len(seen) <= AWQ_POINTS


def test_tied_channels_share_scales() -> None:
    tie = Tie(head_dim=4, repeats=3)
    scales = channel_scales(torch.rand(24, generator=torch.Generator().manual_seed(0)), 0.5, tie)
    runs = scales.view(2, 3, 4)
    assert torch.equal(runs, runs[:, :1].expand_as(runs))
    assert len(set(runs[0, 0].tolist())) == 4


def test_readers_of_different_inputs_share_scales_and_losses_add() -> None:
    first, second = problem(0), problem(1)
    alone = [search_scales([reader], group_size=32, ratios=(0.0,)).nearest_loss for reader in (first, second)]
    assert search_scales([first, second], group_size=32).nearest_loss == pytest.approx(sum(alone), rel=1e-4)


def test_inputs_that_were_never_seen_leave_scales_at_one() -> None:
    reader = Reader(problem(0).weight, Gram(torch.zeros(64, 64), 0))
    choice = search_scales([reader], group_size=32)
    assert torch.equal(choice.scales, torch.ones(64))
    (found,) = quantize_scaled([reader.weight], torch.zeros(64), choice.scales, group_size=32)
    assert float((found.dequantize() - reader.weight).abs().max()) < 0.1


def test_group_size_must_divide() -> None:
    with pytest.raises(BuildError, match="does not divide an input width of 64"):
        search_scales([problem(0)], group_size=48)


def test_linears_together_equal_linears_alone() -> None:
    reader = problem(0)
    scales: Tensor = channel_scales(reader.gram.matrix.diagonal(), 0.3)
    parts = [reader.weight[:8] * scales, reader.weight[8:] * scales]
    energy = reader.gram.matrix.diagonal()
    together = quantize_scaled(parts, energy, scales, group_size=32)
    for part, found in zip(parts, together, strict=True):
        assert torch.equal(quantize_scaled([part], energy, scales, group_size=32)[0].codes, found.codes)


def test_compensation_loses_less_than_rounding_with_a_clip_search() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 64, generator=generator) @ (torch.eye(64) + torch.randn(64, 64, generator=generator) / 6)
    weight, gram = torch.randn(48, 64, generator=generator) * 0.1, x.T @ x
    scales = channel_scales(gram.diagonal(), 0.4)
    (compensated,) = quantize_compensated([weight * scales], gram, scales, group_size=32)
    (rounded,) = quantize_scaled([weight * scales], gram.diagonal(), scales, group_size=32)
    losses = [
        float(row_losses(found.dequantize() / scales - weight, gram).sum())
        for found in (compensated.quantized, rounded)
    ]
    assert losses[0] < 0.7 * losses[1]
    assert compensated.loss == pytest.approx(losses[0], rel=1e-3)
