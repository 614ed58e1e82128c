"""A block's linears rounded to FP4 with error feedback, an input at a time, whatever they are packed as.

In: a block of the calibration pass. Out: its packed tensors, and what each linear loses. The numbers are
numerics/floats.py's; which tensors codes and scales become is for each format to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from quantize.calibration.stream import Block
from quantize.events import Reporter
from quantize.formats.packed.build import Solved
from quantize.formats.packed.feedback import say_raised_damping
from quantize.numerics.floats import Fp4, Fp4Scales, Fp4Solution, collect, row_tasks
from quantize.numerics.gptq import Factor, factorize
from quantize.system.threads import in_stages

ScalesFor = Callable[[Sequence[Tensor]], Fp4Scales]
PackFp4 = Callable[[Fp4, Fp4Scales], Mapping[str, Tensor]]


def solve_fp4_block(
    block: Block, scales_for: ScalesFor, pack: PackFp4, damping: float, variant: str, reporter: Reporter, threads: int
) -> Solved:
    """Packed tensors of a block's linears, and what each one loses, with rounding to nearest beside it, as shares of
    its output's energy over the calibration tokens.

    scales_for: what scales may be, for the weights that read one input. pack: the tensors of one linear, by the last
    part of their names.
    """
    inputs = sorted(block.layout.inputs, key=lambda key: -len(block.grams[key].matrix))  # long ones first
    weights = {key: [block.weights[linear.tensor] for linear in block.layout.inputs[key]] for key in inputs}
    scales: dict[str, Fp4Scales] = {}
    factors: dict[str, Factor] = {}

    def begin(key: str) -> Sequence[Callable[[], tuple[Fp4, Tensor]]]:
        scales[key] = scales_for(weights[key])
        factors[key] = factorize(block.grams[key].matrix, scales[key].group, damping=damping)
        return row_tasks(weights[key], factors[key], scales[key])

    solved = in_stages([partial(begin, key) for key in inputs], threads)
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for key, rows in zip(inputs, solved, strict=True):
        solutions: list[Fp4Solution] = collect(weights[key], rows)
        for linear, solution in zip(block.layout.inputs[key], solutions, strict=True):
            prefix = linear.tensor.removesuffix("weight")
            tensors |= {f"{prefix}{name}": value for name, value in pack(solution.rounded, scales[key]).items()}
            layers[prefix.removesuffix(".")] = {
                "loss": block.share(solution.loss, linear),
                "nearest_loss": block.share(solution.nearest_loss, linear),
                "damping": factors[key].damping,
            }
    say_raised_damping(block, factors, damping, variant, reporter)
    return tensors, layers
