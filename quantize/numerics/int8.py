"""LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339): int8 codes and one absolute maximum per row.

In: a weight [out, in]; what a linear reads, [..., in]. Out: what bitsandbytes keeps of the weight on disk; the product
of both. Left to others: names and files (builders). The arithmetic is bitsandbytes' own, on the float16 values that it
converts every weight and input to.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.numerics.constants import INT8_LOGGER


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


def multiply(rows: Int8Rows, threshold: float, inputs: Tensor, bias: Tensor | None) -> Tensor:
    """What bitsandbytes makes of a linear: [..., out] of inputs [..., in], in their type.

    Each token's values are rounded to 255 levels over its absolute maximum, but for channels in which some token
    reaches the threshold (0: none does): those are left as they are for all tokens. So the tokens of one call depend on
    one another.
    """
    import bitsandbytes

    logging.getLogger(INT8_LOGGER).setLevel(logging.ERROR)
    state = bitsandbytes.MatmulLtState()
    state.CB, state.SCB, state.threshold, state.has_fp16_weights = rows.codes, rows.scales, threshold, False
    state.is_training = False  # in training it multiplies in floating point
    found: Tensor = bitsandbytes.matmul(inputs, rows.codes, bias=bias, state=state)
    return found
