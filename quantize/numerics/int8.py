"""LLM.int8 rows (Dettmers et al. 2022): int8 codes and one absolute maximum per output row.

In: a weight [out, in]. Out: what bitsandbytes keeps of it on disk. Left to others: names and files (builders).
The arithmetic is bitsandbytes' own, on the float16 values that it converts every weight to.
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
