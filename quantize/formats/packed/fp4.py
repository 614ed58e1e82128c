"""A block's linears rounded to FP4 with error feedback, an input at a time, whatever they are packed as.

In: a block of the calibration pass. Out: its packed tensors, and what each linear loses. The numbers are
numerics/floats.py's; which tensors codes and scales become is for each format to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from quantize.calibration.stream import Block
from quantize.events import Reporter
from quantize.formats.packed.build import Solved
from quantize.formats.packed.feedback import Begun, solve_inputs
from quantize.numerics.floats import Fp4, Fp4Scales, collect, row_tasks
from quantize.numerics.gptq import factorize

ScalesFor = Callable[[Sequence[Tensor]], Fp4Scales]
PackFp4 = Callable[[Fp4, Fp4Scales], Mapping[str, Tensor]]


def solve_fp4_block(
    block: Block, scales_for: ScalesFor, pack: PackFp4, damping: float, variant: str, reporter: Reporter, threads: int
) -> Solved:
    """See solve_inputs. scales_for: what scales may be, for the weights that read one input. pack: the tensors of one
    linear, by the last part of their names.
    """

    def begin(weights: list[Tensor], gram: Tensor) -> Begun:
        scales = scales_for(weights)
        factor = factorize(gram, scales.group, damping=damping)

        def finish(parts: Sequence[Any]) -> list[tuple[Mapping[str, Tensor], float, float]]:
            found = collect(weights, parts)
            return [(pack(item.rounded, scales), item.loss, item.nearest_loss) for item in found]

        return Begun(factor.damping, row_tasks(weights, factor, scales), finish)

    return solve_inputs(block, begin, damping, variant, reporter, threads)
