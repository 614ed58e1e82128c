"""A block's linears in an MLX mode: solved, and packed."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quantize.calibration.stream import Block
from quantize.events import Reporter
from quantize.files.shards import torch_dtype
from quantize.formats.mlx.options import MlxOptions
from quantize.formats.packed.build import Solved
from quantize.formats.packed.feedback import Rounding, solve_with_feedback
from quantize.formats.packed.fp4 import solve_fp4_block
from quantize.numerics.floats import Fp4, Fp4Scales
from quantize.numerics.packing import pack_rows
from quantize.numerics.rtn import Quantized


def solve_block(
    block: Block, options: MlxOptions, variant: str, reporter: Reporter, threads: int, half: str
) -> Solved:
    """Packed tensors of a block's linears, and what each one loses as a share of its output's energy."""
    if options.mode != "affine":
        scales = Fp4Scales.mxfp4() if options.mode == "mxfp4" else Fp4Scales.nvfp4_alone()
        return solve_fp4_block(block, lambda _weights: scales, _fours, options.damping, variant, reporter, threads)
    rounding = Rounding(options.bits, options.group_size, False, options.damping, smallest_zero=0)
    pack = partial(_affine, stored=torch_dtype(half))
    return solve_with_feedback(block, rounding, pack, variant, reporter, threads)


def _affine(quantized: Quantized, *, stored: torch.dtype) -> dict[str, Tensor]:
    """w = scale * code + bias: the bias is what a code of 0 stands for, under the scale as it is stored."""
    scales = quantized.scales.to(stored)
    biases = (-quantized.zeros.float() * scales.float()).to(stored)
    return {"weight": pack_rows(quantized.codes, quantized.bits).view(torch.uint32), "scales": scales, "biases": biases}


def _fours(rounded: Fp4, scales: Fp4Scales) -> dict[str, Tensor]:
    words = rounded.packed().contiguous().view(torch.int32).view(torch.uint32)
    return {"weight": words, "scales": scales.stored(rounded.scales).view(torch.uint8)}
