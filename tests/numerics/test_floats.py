"""FP8 and FP4: what is stored is near what was given, and the library that others read with says the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.numerics.activations import round_to_fp8, round_to_int8
from quantize.numerics.dequantize import E2M1, mxfp4_rows, nvfp4, scaled
from quantize.numerics.floats import Fp4Scales, fp8_blocks, fp8_rows, round_to_nearest, solve_fp4
from quantize.numerics.gptq import factorize, row_losses
from quantize.numerics.packing import pack_rows, unpack_rows

seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, out: int, width: int, spread: float = 0.05) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * spread


def gram_of(seed: int, width: int) -> Tensor:
    """Of inputs that are correlated, as hidden states are."""
    inputs = draw(seed, 4 * width, width, 1.0) @ (torch.eye(width) + draw(seed + 1, width, width, 0.2))
    return inputs.T @ inputs


@given(seeds, st.sampled_from([torch.float16, torch.bfloat16]), st.floats(1e-5, 1e3))
def test_rows_of_fp8_are_within_half_a_step(seed: int, stored: torch.dtype, spread: float) -> None:
    weight = draw(seed, 5, 24, spread)
    found = fp8_rows(weight, stored)
    back = scaled(found.codes, found.scales)
    largest = weight.abs().amax(1, keepdim=True)
    assert bool(((back - weight).abs() <= weight.abs() / 16 + largest * 2**-8 / 1.75).all())


@given(seeds, st.integers(1, 40), st.integers(1, 40))
def test_blocks_of_fp8_cover_the_edges(seed: int, out: int, width: int) -> None:
    weight = draw(seed, out, width)
    found = fp8_blocks(weight, 16, torch.float16)
    assert found.scales.shape == (-(-out // 16), -(-width // 16))
    back = scaled(found.codes, found.scales, block=(16, 16))
    assert bool(((back - weight).abs() <= weight.abs() / 16 + weight.abs().max() * 2**-8).all())


def test_rows_of_zeros_stay_zeros() -> None:
    found = fp8_rows(torch.zeros(2, 8), torch.float16)
    assert not scaled(found.codes, found.scales).any()
    assert not round_to_nearest(torch.zeros(2, 32), Fp4Scales.mxfp4()).dequantize().any()


@given(seeds, st.sampled_from(["nvfp4", "mxfp4"]), st.floats(1e-4, 10))
def test_fp4_is_read_as_others_read_it(seed: int, kind: str, spread: float) -> None:
    """The library's own unpacking, in the folder's names, of what is written."""
    from compressed_tensors.compressors.nvfp4.base import unpack_fp4_from_uint8

    weight = draw(seed, 6, 64, spread)
    scales = Fp4Scales.nvfp4([weight]) if kind == "nvfp4" else Fp4Scales.mxfp4()
    found = round_to_nearest(weight, scales)
    codes = unpack_fp4_from_uint8(found.packed(), 6, 64, torch.float32)
    stored = scales.stored(found.scales)
    step = stored.float() / scales.whole if scales.whole else torch.exp2(stored.float() - 127)
    theirs = codes * step.repeat_interleave(scales.group, 1)
    torch.testing.assert_close(found.dequantize(), theirs, rtol=1e-6, atol=0)
    words, whole = found.packed(), scales.whole
    ours = mxfp4_rows(words, stored) if whole is None else nvfp4(words, stored, torch.tensor(whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    largest = weight.abs().view(6, -1, scales.group).amax(2).repeat_interleave(scales.group, 1)
    assert bool(((theirs - weight).abs() <= largest * 0.35).all())


@settings(max_examples=20)
@given(seeds, st.sampled_from(["nvfp4", "mxfp4"]))
def test_solving_loses_less_than_rounding_in_every_row(seed: int, kind: str) -> None:
    weights, gram = [draw(seed, 8, 64), draw(seed + 2, 4, 64)], gram_of(seed, 64)
    scales = Fp4Scales.nvfp4(weights) if kind == "nvfp4" else Fp4Scales.mxfp4()
    solutions = solve_fp4(weights, factorize(gram, scales.group), scales)
    for weight, solution in zip(weights, solutions, strict=True):
        losses = row_losses(solution.rounded.dequantize() - weight, gram)
        nearest = row_losses(round_to_nearest(weight, scales).dequantize() - weight, gram)
        assert bool((losses <= nearest * 1.0001).all())
        assert solution.loss == pytest.approx(float(losses.double().sum()), rel=1e-3)
        assert solution.nearest_loss == pytest.approx(float(nearest.double().sum()), rel=1e-3)
    assert sum(item.loss for item in solutions) < 0.8 * sum(item.nearest_loss for item in solutions)


@given(seeds, st.sampled_from([2, 3, 4, 5, 6, 8]), st.integers(1, 70))
def test_words_of_rows_are_a_bit_stream(seed: int, bits: int, width: int) -> None:
    """As compressed-tensors packs signed codes, for any width."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(0, 2**bits, (3, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = pack_rows(codes, bits)
    assert torch.equal(words, pack_to_int32((codes.int() - 2 ** (bits - 1)).to(torch.int8), bits))
    assert torch.equal(unpack_rows(words, bits, width), codes)


@given(seeds, st.floats(1e-3, 100))
def test_activations_are_rounded_as_the_library_rounds_them(seed: int, spread: float) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize  # what a compressed linear calls

    values, linear = draw(seed, 4, 256, spread), torch.nn.Linear(1, 1)
    linear.quantization_status = QuantizationStatus.FROZEN
    for ours, settings_of in (
        (round_to_int8(values), {"num_bits": 8, "type": "int", "strategy": "token"}),
        (round_to_fp8(values), {"num_bits": 8, "type": "float", "strategy": "token"}),
        (round_to_fp8(values, 128), {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128}),
    ):
        args = QuantizationArgs(symmetric=True, dynamic=True, **settings_of)
        theirs = forward_quantize(linear, values[None], "input", args)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=float(values.abs().max()) * 1e-6)


def test_a_scale_may_put_the_largest_weight_on_four() -> None:
    """E2M1 has no level between 4 and 6: 0.6 and 0.45 are 6 and 4.5 of one scale, near 4 and 3 of another."""
    weight = torch.tensor([[1.2] * 16 + [0.6, 0.45] * 8])  # the first group is what the range is for
    scales = Fp4Scales.nvfp4([weight])
    (solved,) = solve_fp4([weight], factorize(torch.eye(32), 16), scales)
    assert solved.rounded.codes[0, 16:].unique().tolist() == [E2M1.index(3.0), E2M1.index(4.0)]
    assert solved.loss < 0.6 * solved.nearest_loss
