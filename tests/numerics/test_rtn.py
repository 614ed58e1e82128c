"""Rounding to nearest, and the clip search that replaces the full range."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantize.errors import BuildError
from quantize.numerics.rtn import BITS, Quantized, encode, full_range, round_to_nearest
from quantize.numerics.scales import ScaleSearch

seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, *shape: int) -> torch.Tensor:
    """Heavy-tailed weights, as models have."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator).add(0.1).reciprocal()


@given(seeds, st.sampled_from(BITS), st.booleans())
def test_error_is_at_most_one_step(seed: int, bits: int, symmetric: bool) -> None:
    weight = draw(seed, 6, 64)
    quantized = round_to_nearest(weight, bits=bits, group_size=32, symmetric=symmetric)
    steps = quantized.scales.float().repeat_interleave(32, 1)
    bound = 1.02 * steps if symmetric or bits == 2 else 0.55 * steps + 0.002 * weight.abs().amax()
    assert bool(((quantized.dequantize() - weight).abs() <= bound).all())
    assert int(quantized.codes.max()) < 2**bits


@given(seeds, st.sampled_from(BITS), st.booleans())
def test_quantizing_twice_changes_nothing(seed: int, bits: int, symmetric: bool) -> None:
    once = round_to_nearest(draw(seed, 4, 64), bits=bits, group_size=16, symmetric=symmetric)
    again = encode(once.dequantize(), once.scales.float(), once.zeros.float(), bits=bits, group_size=16)
    assert torch.equal(again.codes, once.codes)
    assert torch.equal(again.dequantize(), once.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_groups_stay_zero(symmetric: bool) -> None:
    weight = draw(0, 4, 64)
    weight[1, :32] = 0
    quantized = round_to_nearest(weight, bits=4, group_size=32, symmetric=symmetric)
    assert bool((quantized.dequantize()[1, :32] == 0).all())
    scales, zeros = ScaleSearch(4, symmetric).best(torch.zeros(32, 3), torch.ones(32))
    assert bool(torch.isfinite(scales).all() and (scales != 0).all() and torch.isfinite(zeros).all())


@given(seeds, st.sampled_from(BITS), st.booleans(), st.integers(0, 1))
def test_clip_search_never_loses_to_the_full_range(seed: int, bits: int, symmetric: bool, smallest_zero: int) -> None:
    values = draw(seed, 5, 64).double().float()
    weights = draw(seed + 1, 64).abs() + 1e-3
    scales, zeros = ScaleSearch(bits, symmetric, smallest_zero).best(values.T.contiguous(), weights)
    assert torch.equal(scales.half().float(), scales)
    assert torch.equal(zeros.round(), zeros)
    assert float(zeros.min()) >= (2 ** (bits - 1) if symmetric else smallest_zero)

    def loss(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        found = encode(values, scale[:, None], zero[:, None], bits=bits, group_size=64).dequantize()
        return ((found - values).square() * weights).sum(1)

    full_scales, full_zeros = full_range(values, bits, symmetric=symmetric)
    if symmetric or smallest_zero == 0:
        assert bool((loss(scales, zeros) <= loss(full_scales, full_zeros) * 1.0001 + 1e-9).all())


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(BuildError, match=r"group size 48 does not divide an input width of 64\n.*16, 32, 64"):
        round_to_nearest(torch.zeros(2, 64), bits=4, group_size=48, symmetric=True)
    with pytest.raises(BuildError, match="7 bits are not supported"):
        round_to_nearest(torch.zeros(2, 64), bits=7, group_size=32, symmetric=True)


def test_rows_split_and_rejoin() -> None:
    quantized = round_to_nearest(draw(0, 6, 64), bits=4, group_size=32, symmetric=False)
    parts = quantized.split([1, 3, 2])
    assert [len(part.codes) for part in parts] == [1, 3, 2]
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), quantized.dequantize())
    assert isinstance(parts[0], Quantized)
