"""LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339): int8 codes and one absolute maximum per row.

In: a weight [out, in]; what a linear reads, [tokens, in]. Out: what bitsandbytes keeps of the weight on disk, and what
it multiplies it with. Left to others: names and files (builders). The arithmetic is bitsandbytes' own, on the float16
values that it converts every weight and input to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Int8Rows:
    """w[o, i] = codes[o, i] * scales[o] / 127. codes: int8 [out, in]; scales: float32 [out] (bitsandbytes' SCB)."""

    codes: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, float32 [out, in]."""
        return self.codes.float() * (self.scales / 127)[:, None]


def quantize_int8(weight: Tensor) -> Int8Rows:
    """Round each row of a floating weight [out, in] to 255 levels over its absolute maximum; zero rows stay zero."""
    from bitsandbytes import functional

    codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
    return Int8Rows(codes, scales)


def round_inputs(inputs: Tensor, threshold: float) -> Tensor:
    """What LLM.int8 multiplies a weight with in place of [tokens, in], float32.

    Each token's values are rounded to 255 levels over its absolute maximum, but for channels in which some token
    reaches the threshold (0: none does): those are left as they are for all tokens, and values that reach it count for
    no maximum. So the tokens of one forward pass depend on one another.
    """
    half = inputs.half()
    outliers = half.abs() >= (threshold or torch.inf)
    usual = half.masked_fill(outliers, 0).float()
    largest = usual.abs().amax(1, keepdim=True).clamp(min=1e-20)  # a row of zeros stays one
    rounded = torch.round(usual * (127 / largest)) * (largest / 127)
    return torch.where(outliers.any(0), inputs.float(), rounded)
