"""Packing is undone by unpacking, and its bits are where other programs look for them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantize.errors import BuildError
from quantize.numerics.packing import pack_awq, pack_gptq, unpack_awq, unpack_gptq
from quantize.numerics.rtn import BITS, Quantized

seeds = st.integers(0, 2**32 - 1)

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight outputs in a word


def random_quantized(seed: int, bits: int, out: int, groups: int, group_size: int, smallest_zero: int) -> Quantized:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, 2**bits, shape, generator=generator, dtype=torch.uint8)

    scales = torch.randn(out, groups, generator=generator).half()
    return Quantized(draw(out, groups * group_size), scales, draw(out, groups, low=smallest_zero), bits, group_size)


def assert_same(found: Quantized, expected: Quantized) -> None:
    for field in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(found, field), getattr(expected, field)), field
    assert (found.bits, found.group_size) == (expected.bits, expected.group_size)
    assert torch.equal(found.dequantize(), expected.dequantize())


@given(seeds, st.sampled_from(BITS), st.integers(1, 3), st.integers(1, 4), st.sampled_from([32, 64, 96]))
def test_gptq_round_trip(seed: int, bits: int, outs: int, groups: int, group_size: int) -> None:
    quantized = random_quantized(seed, bits, 32 * outs, groups, group_size, smallest_zero=1)
    packed = pack_gptq(quantized)
    out, width = quantized.codes.shape
    assert packed.qweight.shape == (width * bits // 32, out)
    assert packed.qzeros.shape == (groups, out * bits // 32)
    assert packed.scales.shape == (groups, out)
    assert packed.g_idx.tolist() == [column // group_size for column in range(width)]
    assert {packed.qweight.dtype, packed.qzeros.dtype, packed.g_idx.dtype} == {torch.int32}
    assert_same(unpack_gptq(packed, bits), quantized)


@given(seeds, st.integers(1, 6), st.integers(1, 4), st.sampled_from([16, 32, 64]))
def test_awq_round_trip(seed: int, outs: int, groups: int, group_size: int) -> None:
    quantized = random_quantized(seed, 4, 8 * outs, groups, group_size, smallest_zero=0)
    packed = pack_awq(quantized)
    out, width = quantized.codes.shape
    assert packed.qweight.shape == (width, out // 8)
    assert packed.qzeros.shape == (groups, out // 8)
    assert_same(unpack_awq(packed), quantized)


@given(seeds, st.sampled_from([2, 4, 8]))
def test_gptq_bits_by_hand(seed: int, bits: int) -> None:
    quantized = random_quantized(seed, bits, 32, 1, 32, smallest_zero=1)
    packed = pack_gptq(quantized)
    each = 32 // bits
    for row in range(32 // each):
        word = packed.qweight[row, 3].item() & 0xFFFFFFFF
        assert [(word >> (bits * k)) % 2**bits for k in range(each)] == quantized.codes[3, row * each :][:each].tolist()
    word = packed.qzeros[0, 0].item() & 0xFFFFFFFF
    assert [(word >> (bits * k)) % 2**bits + 1 for k in range(each)] == quantized.zeros[:each, 0].tolist()


def test_three_bit_codes_are_one_stream_of_bits() -> None:
    quantized = random_quantized(0, 3, 32, 1, 32, smallest_zero=1)
    words = [word & 0xFFFFFFFF for word in pack_gptq(quantized).qweight[:, 5].tolist()]
    stream = sum(word << (32 * place) for place, word in enumerate(words))
    assert [(stream >> (3 * k)) & 7 for k in range(32)] == quantized.codes[5].tolist()


def test_awq_order_by_hand() -> None:
    quantized = random_quantized(0, 4, 8, 1, 16, smallest_zero=0)
    word = pack_awq(quantized).qweight[2, 0].item() & 0xFFFFFFFF
    assert [(word >> (4 * place)) & 15 for place in range(8)] == [quantized.codes[out, 2].item() for out in AWQ_ORDER]


def test_shapes_and_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BuildError, match="holds 4 bits, not 8"):
        pack_awq(random_quantized(0, 8, 8, 1, 16, 0))
    with pytest.raises(BuildError, match="output width 12 is no multiple of 8"):
        pack_awq(random_quantized(0, 4, 12, 1, 16, 0))
    with pytest.raises(BuildError, match="input width 16 is no multiple of 32"):
        pack_gptq(random_quantized(0, 3, 32, 1, 16, 1))
    quantized = random_quantized(0, 4, 32, 1, 32, 1)
    quantized.zeros[0, 0] = 0
    with pytest.raises(BuildError, match="can't hold a zero point of 0"):
        pack_gptq(quantized)
