"""Activations as dynamic schemes round them: a scale for each token, or for each group of a token's channels.

In: what a linear reads, [tokens, in]. Out: the same, rounded, as runtimes multiply it. The scales are those that
compressed-tensors computes (quantization/utils/helpers.py): the largest magnitude over half of the range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.numerics.floats import E4M3, E4M3_MAX

INT8_RANGE = 127.5  # from -128 to 127


def round_to_int8(values: Tensor) -> Tensor:
    """Each row [in] in whole steps of its own. Any floating type; float32 back."""
    wide = values.float()
    scales = (wide.abs().amax(-1, keepdim=True) / INT8_RANGE).clamp_min(torch.finfo(torch.float32).tiny)
    return (wide / scales).round_().clamp_(-128, 127).mul_(scales)


def round_to_fp8(values: Tensor, group: int | None = None) -> Tensor:
    """Each row [in], or each group of a row, as E4M3 over its range. Any floating type; float32 back."""
    wide = values.float()
    width = wide.shape[-1]
    if group is None or width % group:
        return _fp8(wide)
    return _fp8(wide.reshape(*wide.shape[:-1], -1, group)).flatten(-2)


def _fp8(values: Tensor) -> Tensor:
    scales = (values.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return (values / scales).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3).float().mul_(scales)
