"""A block's linears in a compressed-tensors scheme: solved, and packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantize.calibration.stream import Block
from quantize.events import Reporter
from quantize.formats.awq.build import AwqOptions, AwqScaling
from quantize.formats.compressed_tensors.options import CompressedTensorsOptions
from quantize.formats.compressed_tensors.schemes import INTEGERS, NVFP4, PACKED
from quantize.formats.packed.build import Solved
from quantize.formats.packed.feedback import Rounding, solve_with_feedback
from quantize.formats.packed.fp4 import solve_fp4_block
from quantize.formats.packed.scaled import solve_scaled
from quantize.numerics.awq import Reader, ScaleChoice, Tie
from quantize.numerics.floats import Fp4, Fp4Scales
from quantize.numerics.packing import pack_rows
from quantize.numerics.rtn import Quantized
from quantize.numerics.smooth import quantize_rows, search_smoothing

SIGN = 128  # of 8-bit codes, between those that are signed and those that are not


def solve_block(
    block: Block, options: CompressedTensorsOptions, variant: str, reporter: Reporter, threads: int, half: str
) -> Solved:
    """Tensors of a block that change, and what each linear loses as a share of its output's energy."""
    scheme = options.kind
    if scheme.layout not in (PACKED, INTEGERS):
        scales_for = Fp4Scales.nvfp4 if scheme.layout == NVFP4 else lambda _weights: Fp4Scales.mxfp4()
        return solve_fp4_block(block, scales_for, _fours, options.damping, variant, reporter, threads)
    pack = partial(_rows if scheme.layout == INTEGERS else _packed, symmetric=scheme.symmetric)
    if options.method == "awq":
        found = AwqOptions.model_validate({"group_size": options.group_size})
        return solve_scaled(block, AwqScaling(found, scheme.symmetric), pack, threads, half)
    if options.smooth:
        return solve_scaled(block, Smoothing(options.damping), pack, threads, half)
    rounding = Rounding(options.bits, options.group_size, scheme.symmetric, options.damping, smallest_zero=0)
    return solve_with_feedback(block, rounding, pack, variant, reporter, threads)


@dataclass(frozen=True)
class Smoothing:
    """See Scaling."""

    damping: float

    def search(self, readers: Sequence[Reader], tie: Tie | None) -> ScaleChoice:
        """See Scaling."""
        return search_smoothing(readers, tie)

    def quantize(self, weights: list[Tensor], gram: Tensor, scales: Tensor) -> list[tuple[Quantized, float]]:
        """See Scaling."""
        return [
            (item.quantized, item.loss) for item in quantize_rows(weights, gram, scales, damping=self.damping)
        ]


def _packed(quantized: Quantized, *, symmetric: bool) -> dict[str, Tensor]:
    """Codes in words along the inputs, zero points in words along the outputs."""
    found = {
        "weight_packed": pack_rows(quantized.codes, quantized.bits),
        "weight_scale": quantized.scales,
        "weight_shape": torch.tensor(quantized.codes.shape),
    }
    if not symmetric:
        found["weight_zero_point"] = pack_rows(quantized.zeros.T.contiguous(), quantized.bits).T.contiguous()
    return found


def _rows(quantized: Quantized, *, symmetric: bool) -> dict[str, Tensor]:
    """Signed bytes, with a scale a row."""
    return {"weight": (quantized.codes.short() - SIGN).to(torch.int8), "weight_scale": quantized.scales}


def _fours(rounded: Fp4, scales: Fp4Scales) -> dict[str, Tensor]:
    """Two codes a byte, and scales as they are stored."""
    found = {"weight_packed": rounded.packed(), "weight_scale": scales.stored(rounded.scales)}
    if scales.whole is not None:
        found["weight_global_scale"] = torch.tensor([scales.whole])
    return found
