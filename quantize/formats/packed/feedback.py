"""A block's linears rounded with error feedback, an input at a time, whatever they are packed as.

In: a block of the calibration pass. Out: its packed tensors, and what each linear loses. The numbers are
numerics/gptq.py's; which tensors codes and scales become is for each format to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from quantize.events import Reporter, warn
from quantize.formats.packed.build import Solved
from quantize.system.threads import in_stages, on_threads

if TYPE_CHECKING:
    import torch

    from quantize.calibration.stream import Block
    from quantize.numerics.gptq import Factor, SolvedRows
    from quantize.numerics.rtn import Quantized

    Pack = Callable[[Quantized], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Rounding:
    """To what and how. group_size: None for one scale a row. smallest_zero: 1 where a format can't store 0."""

    bits: int
    group_size: int | None
    symmetric: bool
    damping: float
    smallest_zero: int = 1


def solve_with_feedback(
    block: Block, rounding: Rounding, pack: Pack, variant: str, reporter: Reporter, threads: int
) -> Solved:
    """Packed tensors of a block's linears, and what each one loses, with rounding to nearest beside it, as shares of
    its output's energy over the calibration tokens; one factorization for each input.

    pack: the tensors of one linear, by the last part of their names.
    """
    from quantize.numerics.gptq import collect, factorize, row_tasks

    inputs = sorted(block.layout.inputs, key=lambda key: -len(block.grams[key].matrix))  # long ones first
    weights = {key: [block.weights[linear.tensor] for linear in block.layout.inputs[key]] for key in inputs}
    factors: dict[str, Factor] = {}

    def begin(key: str) -> Sequence[Callable[[], SolvedRows]]:
        gram = block.grams[key].matrix
        factors[key] = factorize(gram, rounding.group_size or len(gram), damping=rounding.damping)
        return row_tasks(
            weights[key], factors[key], bits=rounding.bits, symmetric=rounding.symmetric,
            smallest_zero=rounding.smallest_zero,
        )  # fmt: skip

    def finish(key: str, rows: Sequence[SolvedRows]) -> Solved:
        tensors: dict[str, torch.Tensor] = {}
        layers: dict[str, Any] = {}
        solutions = collect(weights[key], rows)
        for linear, solution in zip(block.layout.inputs[key], solutions, strict=True):
            prefix = linear.tensor.removesuffix("weight")
            tensors |= {f"{prefix}{name}": tensor for name, tensor in pack(solution.quantized).items()}
            layers[prefix.removesuffix(".")] = {
                "loss": block.share(solution.loss, linear),
                "nearest_loss": block.share(solution.nearest_loss, linear),
                "damping": factors[key].damping,
            }
        return tensors, layers

    solved = in_stages([partial(begin, key) for key in inputs], threads)
    finished = on_threads([partial(finish, key, rows) for key, rows in zip(inputs, solved, strict=True)], threads)
    say_raised_damping(block, factors, rounding.damping, variant, reporter)
    tensors = {name: tensor for found, _ in finished for name, tensor in found.items()}
    return tensors, {name: layer for _, found in finished for name, layer in found.items()}


def say_raised_damping(
    block: Block, factors: Mapping[str, Factor], asked: float, variant: str, reporter: Reporter
) -> None:
    """Warn of inputs whose Gram matrix could only be factorized with more damping than was asked for."""
    for key, linears in block.layout.inputs.items():
        damping = factors[key].damping
        if damping > asked:
            warn(reporter, variant, f"{linears[0].tensor}: damping raised to {damping:g} to make it solvable")
