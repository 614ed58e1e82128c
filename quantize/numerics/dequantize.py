"""Weights that others have quantized -> float32, one tensor at a time.

In: codes and scales as checkpoints hold them. Out: float32. Left to others: which tensors belong together, and the
dtype that is written. Layouts: DeepSeek-V3's FP8 blocks (its inference/fp8_cast_bf16.py), OCP Microscaling MXFP4 as
gpt-oss stores it, NVFP4, bitsandbytes' 4-bit states, integers packed as compressed-tensors does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# E2M1 (OCP Microscaling Formats 1.0, table 3): one sign, two exponent and one mantissa bit.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
MX_BIAS = 127  # of E8M0 scales
NESTED_BLOCK = 256


def scaled(codes: Tensor, scales: Tensor, zeros: Tensor | None = None, block: Sequence[int] | None = None) -> Tensor:
    """(codes - zeros) * scales, float32 [..., out, in].

    codes: [..., out, in], of any type. scales, zeros: one for all, or [..., a, b] for blocks of weights. block: their
    size; None where out and in are its multiples.
    """
    values = codes.float()
    if zeros is not None:
        values -= spread(zeros.float(), codes.shape, block)
    return values.mul_(spread(scales.float(), codes.shape, block))


def spread(scales: Tensor, shape: Sequence[int], block: Sequence[int] | None = None) -> Tensor:
    """Scales of blocks as one that multiplies a weight of this shape; the last blocks may be cut short."""
    if scales.numel() == 1:
        return scales.reshape(())
    if scales.dim() == 1:
        scales = scales.unsqueeze(-1)
    for axis in (-2, -1):
        count, width = scales.shape[axis], shape[axis]
        if count not in (1, width):
            size = block[axis] if block is not None else width // count
            scales = scales.repeat_interleave(size, dim=axis).narrow(axis, 0, width)
    return scales


def unpack_columns(words: Tensor, bits: int, width: int) -> Tensor:
    """int32 [out, words] with the lowest bits first -> signed codes, int32 [out, width]; stored with half added."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.reshape(words.shape[0], -1)[:, :width] - (1 << (bits - 1))


def unpack_rows(words: Tensor, bits: int, rows: int) -> Tensor:
    """The same for zero points, which are packed along the outputs: int32 [words, groups] -> [rows, groups]."""
    return unpack_columns(words.T.contiguous(), bits, rows).T.contiguous()


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 [experts, out, groups, 16] and E8M0 scales [experts, out, groups] -> float32 [experts, in, out].

    Two codes a byte, the low one first, 32 weights a group; turned as transformers keeps gpt-oss' experts.
    """
    values = e2m1(blocks)
    values = torch.ldexp(values, (scales.to(torch.int32) - MX_BIAS).unsqueeze(-1))
    return values.flatten(-2).transpose(-1, -2).contiguous()


def mxfp4_rows(words: Tensor, scales: Tensor) -> Tensor:
    """uint8 [out, in / 2] and E8M0 scales [out, in / 32] -> float32 [out, in]."""
    return scaled(e2m1(words), torch.exp2(scales.float() - MX_BIAS))


def nvfp4(words: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """uint8 [out, in / 2], scales [out, in / 16] and what they were multiplied by -> float32 [out, in]."""
    return scaled(e2m1(words), scales.float() / global_scale.float())


def e2m1(words: Tensor) -> Tensor:
    """uint8 [..., n] -> float32 [..., 2 n], the low nibble of each byte first."""
    levels = torch.tensor(E2M1)
    return torch.stack((levels[(words & 15).long()], levels[(words >> 4).long()]), -1).flatten(-2)


def four_bit(words: Tensor, absmax: Tensor, levels: Tensor, block: int, shape: Sequence[int]) -> Tensor:
    """bitsandbytes' 4-bit blocks -> float32 of that shape. words: uint8, high nibble first. absmax: float32 a block."""
    flat = words.flatten()
    codes = torch.stack((flat >> 4, flat & 15), dim=1).flatten()
    values = levels.float()[codes.long()][: torch.Size(shape).numel()]
    return values.mul_(absmax.float().repeat_interleave(block)[: values.numel()]).reshape(*shape)


def nested_absmax(codes: Tensor, levels: Tensor, absmax: Tensor, offset: float, block: int = NESTED_BLOCK) -> Tensor:
    """Absolute maxima that were quantized again (double quantization) -> float32, one a block."""
    values = levels.float()[codes.flatten().long()]
    return values.mul_(absmax.float().repeat_interleave(block)[: values.numel()]).add_(offset)
