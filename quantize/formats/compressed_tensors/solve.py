"""A block's linears in a compressed-tensors scheme: solved, and packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantize.calibration.stream import Block
from quantize.events import Reporter
from quantize.formats.awq.build import AwqOptions
from quantize.formats.awq.build import solve_block as solve_awq
from quantize.formats.compressed_tensors.options import CompressedTensorsOptions
from quantize.formats.compressed_tensors.schemes import INTEGERS, NVFP4, PACKED
from quantize.formats.packed.build import Solved
from quantize.formats.packed.feedback import Rounding, say_raised_damping, solve_with_feedback
from quantize.model.layout import Linear
from quantize.numerics import floats
from quantize.numerics.gptq import Factor, factorize
from quantize.numerics.packing import pack_rows
from quantize.numerics.rtn import Quantized
from quantize.system.threads import in_stages

SIGN = 128  # of 8-bit codes, between those that are signed and those that are not


def solve_block(
    block: Block, options: CompressedTensorsOptions, variant: str, reporter: Reporter, threads: int, half: str
) -> Solved:
    """Tensors of a block that change, and what each linear loses as a share of its output's energy."""
    scheme = options.kind
    if scheme.layout not in (PACKED, INTEGERS):
        return _solve_fp4(block, options, variant, reporter, threads)
    pack = partial(_rows if scheme.layout == INTEGERS else _packed, symmetric=scheme.symmetric)
    if options.method == "awq":
        found = AwqOptions.model_validate({"group_size": options.group_size})
        return solve_awq(block, found, threads, half, pack, symmetric=scheme.symmetric)
    rounding = Rounding(options.bits, options.group_size, scheme.symmetric, options.damping, smallest_zero=0)
    return solve_with_feedback(block, rounding, pack, variant, reporter, threads)


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


def _solve_fp4(
    block: Block, options: CompressedTensorsOptions, variant: str, reporter: Reporter, threads: int
) -> Solved:
    inputs = sorted(block.layout.inputs, key=lambda key: -len(block.grams[key].matrix))  # long ones first
    weights = {key: [block.weights[linear.tensor] for linear in block.layout.inputs[key]] for key in inputs}
    scales: dict[str, floats.Fp4Scales] = {}
    factors: dict[str, Factor] = {}

    def begin(key: str) -> Sequence[Callable[[], tuple[floats.Fp4, Tensor]]]:
        is_nv = options.kind.layout == NVFP4
        scales[key] = floats.Fp4Scales.nvfp4(weights[key]) if is_nv else floats.Fp4Scales.mxfp4()
        factors[key] = factorize(block.grams[key].matrix, scales[key].group, damping=options.damping)
        return floats.row_tasks(weights[key], factors[key], scales[key])

    solved = in_stages([partial(begin, key) for key in inputs], threads)
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for key, rows in zip(inputs, solved, strict=True):
        solutions = floats.collect(weights[key], rows)
        for linear, solution in zip(block.layout.inputs[key], solutions, strict=True):
            prefix = linear.tensor.removesuffix("weight")
            tensors |= {f"{prefix}{name}": value for name, value in _fours(solution.rounded, scales[key]).items()}
            layers[prefix.removesuffix(".")] = _losses(block, linear, solution, factors[key].damping)
    say_raised_damping(block, factors, options.damping, variant, reporter)
    return tensors, layers


def _losses(block: Block, linear: Linear, solution: floats.Fp4Solution, damping: float) -> dict[str, float]:
    loss, nearest = block.share(solution.loss, linear), block.share(solution.nearest_loss, linear)
    return {"loss": loss, "nearest_loss": nearest, "damping": damping}


def _fours(rounded: floats.Fp4, scales: floats.Fp4Scales) -> dict[str, Tensor]:
    """Two codes a byte, and scales as they are stored."""
    found = {"weight_packed": rounded.packed(), "weight_scale": scales.stored(rounded.scales)}
    if scales.whole is not None:
        found["weight_global_scale"] = torch.tensor([scales.whole])
    return found
