"""Codes to int32 words and back, in the two layouts that runtimes read.

In: Quantized. Out: the tensors of an AWQ "gemm" or a GPTQ v1 linear, and the inverse of both; the words of
compressed-tensors. Left to others: names, configs and files (builders). AWQ packs 8 nibbles a word along the output
axis in the order 0 2 4 6 1 3 5 7; GPTQ v1 packs codes along the input axis and zero points along the output axis,
lowest bits first, and stores each zero point minus one. compressed-tensors packs codes along the input axis of each row
and zero points along the output axis, lowest bits first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.errors import BuildError
from quantize.numerics.rtn import Quantized


@dataclass(frozen=True)
class AwqTensors:
    """qweight int32 [in, out/8], qzeros int32 [in/g, out/8], scales float16 [in/g, out]."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor


@dataclass(frozen=True)
class GptqTensors:
    """qweight int32 [in*bits/32, out], qzeros int32 [in/g, out*bits/32],

    scales float16 [in/g, out], g_idx int32 [in].
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor


def pack_awq(quantized: Quantized) -> AwqTensors:
    """The tensors of an AWQ gemm linear.

    Raises:
        BuildError: not 4 bits, or an output width that is no multiple of 8.
    """
    if quantized.bits != 4:
        raise BuildError(f"AWQ's gemm layout holds 4 bits, not {quantized.bits}")
    _check_multiple(quantized.codes.shape[0], 8, "output")
    return AwqTensors(
        _pack_nibbles(quantized.codes.T), _pack_nibbles(quantized.zeros.T), quantized.scales.T.contiguous()
    )


def unpack_awq(tensors: AwqTensors) -> Quantized:
    """The codes, scales and zero points of an AWQ gemm linear."""
    codes, zeros = (_unpack_nibbles(words).T.contiguous() for words in (tensors.qweight, tensors.qzeros))
    group_size = tensors.qweight.shape[0] // tensors.qzeros.shape[0]
    return Quantized(codes, tensors.scales.T.contiguous(), zeros, 4, group_size)


def pack_gptq(quantized: Quantized) -> GptqTensors:
    """The tensors of a GPTQ v1 linear, for 2, 3, 4 and 8 bits.

    Raises:
        BuildError: widths that do not fill whole words, or a zero point of 0, which v1 can't store.
    """
    bits, (out, width) = quantized.bits, quantized.codes.shape
    _check_multiple(width, 32 // _gcd(bits), "input")
    _check_multiple(out, 32 // _gcd(bits), "output")
    if bool((quantized.zeros == 0).any()):
        raise BuildError("GPTQ v1 stores each zero point minus one, so it can't hold a zero point of 0")
    index = torch.arange(width, dtype=torch.int32, device=quantized.codes.device) // quantized.group_size
    return GptqTensors(
        _pack_bits(quantized.codes.T, bits),
        _pack_bits((quantized.zeros.T - 1).T, bits).T.contiguous(),
        quantized.scales.T.contiguous(),
        index,
    )


def unpack_gptq(tensors: GptqTensors, bits: int) -> Quantized:
    """The codes, scales and zero points of a GPTQ v1 linear whose g_idx is in order."""
    codes = _unpack_bits(tensors.qweight, bits).T.contiguous()
    zeros = _unpack_bits(tensors.qzeros.T.contiguous(), bits) + 1
    group_size = codes.shape[1] // tensors.scales.shape[0]
    return Quantized(codes, tensors.scales.T.contiguous(), zeros, bits, group_size)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """uint8 [out, in] -> int32 [out, ceil(in * bits / 32)]: a little-endian bit stream along each row, padded with 0.

    It is what compressed-tensors calls pack-quantized, which adds half the range to signed codes first: codes here are
    not signed, and are stored as they are.
    """
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 32))
    words = _pack_bits(padded.T.contiguous(), bits).T.contiguous()
    return words[:, : -(-codes.shape[1] * bits // 32)].contiguous()


def unpack_rows(words: Tensor, bits: int, width: int) -> Tensor:
    """int32 [out, words] -> uint8 [out, width], the inverse of pack_rows."""
    whole = torch.nn.functional.pad(words, (0, -words.shape[1] % bits))
    return _unpack_bits(whole.T.contiguous(), bits).T[:, :width].contiguous()


def _pack_nibbles(values: Tensor) -> Tensor:
    """uint8 [n, out] -> int32 [n, out/8] in AWQ's order."""
    words = values.reshape(values.shape[0], -1, 8)
    ordered = torch.cat((words[..., 0::2], words[..., 1::2]), -1)
    pairs = ordered[..., 0::2] | (ordered[..., 1::2] << 4)
    return _rows(pairs).view(torch.int32).squeeze(-1)


def _unpack_nibbles(words: Tensor) -> Tensor:
    """int32 [n, out/8] in AWQ's order -> uint8 [n, out]."""
    pairs = _rows(words.unsqueeze(-1)).view(torch.uint8)
    ordered = torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)
    return torch.stack((ordered[..., :4], ordered[..., 4:]), -1).flatten(1)


def _pack_bits(values: Tensor, bits: int) -> Tensor:
    """uint8 [n, m] -> int32 [n*bits/32, m]: a little-endian bit stream down each column."""
    if 8 % bits == 0:
        per_byte = 8 // bits
        parts = values.reshape(-1, per_byte, values.shape[1])
        packed = parts[:, 0].clone()
        for place in range(1, per_byte):
            packed |= parts[:, place] << (bits * place)
    else:
        packed = _bytes_of_bits(values, bits)
    return _rows(packed.T).view(torch.int32).T.contiguous()


def _unpack_bits(words: Tensor, bits: int) -> Tensor:
    """int32 [n*bits/32, m] -> uint8 [n, m], the inverse of _pack_bits."""
    packed = _rows(words.T).view(torch.uint8).T
    if 8 % bits == 0:
        mask = 2**bits - 1
        parts = torch.stack([(packed >> (bits * place)) & mask for place in range(8 // bits)], 1)
        return parts.flatten(0, 1)
    stream = torch.stack([(packed >> place) & 1 for place in range(8)], 1).flatten(0, 1)
    digits = stream.view(-1, bits, stream.shape[1])
    return sum((digits[:, place] << place for place in range(1, bits)), digits[:, 0])


def _bytes_of_bits(values: Tensor, bits: int) -> Tensor:
    stream = torch.stack([(values >> place) & 1 for place in range(bits)], 1).flatten(0, 1)
    octets = stream.view(-1, 8, stream.shape[1])
    return sum((octets[:, place] << place for place in range(1, 8)), octets[:, 0])


def _rows(tensor: Tensor) -> Tensor:
    # contiguous() leaves the strides of axes of one element as they are, and view() to another type looks at those
    return tensor.clone(memory_format=torch.contiguous_format)


def _gcd(bits: int) -> int:
    return bits & -bits  # the largest power of two that divides `bits`: 32 codes of 3 bits fill three words


def _check_multiple(size: int, divisor: int, axis: str) -> None:
    if size % divisor:
        raise BuildError(f"{axis} width {size} is no multiple of {divisor}, which this layout packs at a time")
