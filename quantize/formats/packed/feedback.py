"""A block's linears rounded with error feedback, an input at a time, whatever they are packed as.

In: a block of the calibration pass. Out: its packed tensors, and what each linear loses. The numbers of integers are
numerics/gptq.py's, of FP4 fp4.py's; which tensors codes and scales become is for each format to say.
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


@dataclass(frozen=True)
class Begun:
    """The work on one input: its tasks may run in any order, or at once. damping: that made it solvable. finish: of
    what they gave, for each linear its packed tensors, by the last part of their names, its loss and rounding to
    nearest's.
    """

    damping: float
    tasks: Sequence[Callable[[], Any]]
    finish: Callable[[Sequence[Any]], Sequence[tuple[Mapping[str, torch.Tensor], float, float]]]


Begin = Callable[["list[torch.Tensor]", "torch.Tensor"], Begun]


def solve_inputs(block: Block, begin: Begin, asked: float, variant: str, reporter: Reporter, threads: int) -> Solved:
    """Packed tensors of a block's linears, and what each one loses, with rounding to nearest beside it, as shares of
    its output's energy over the calibration tokens.

    begin: of the weights that read one input, and its Gram matrix. asked: the damping, of which more is said.
    """
    inputs = sorted(block.layout.inputs, key=lambda key: -len(block.grams[key].matrix))  # long ones first
    begun: dict[str, Begun] = {}

    def tasks(key: str) -> Sequence[Callable[[], Any]]:
        weights = [block.weights[linear.tensor] for linear in block.layout.inputs[key]]
        begun[key] = begin(weights, block.grams[key].matrix)
        return begun[key].tasks

    def finish(key: str, parts: Sequence[Any]) -> Solved:
        tensors: dict[str, torch.Tensor] = {}
        layers: dict[str, Any] = {}
        linears = block.layout.inputs[key]
        for linear, (packed, loss, nearest) in zip(linears, begun[key].finish(parts), strict=True):
            prefix = linear.tensor.removesuffix("weight")
            tensors |= {f"{prefix}{name}": tensor for name, tensor in packed.items()}
            layers[prefix.removesuffix(".")] = {
                "loss": block.share(loss, linear),
                "nearest_loss": block.share(nearest, linear),
                "damping": begun[key].damping,
            }
        return tensors, layers

    solved = in_stages([partial(tasks, key) for key in inputs], threads)
    finished = on_threads([partial(finish, key, parts) for key, parts in zip(inputs, solved, strict=True)], threads)
    for key, linears in block.layout.inputs.items():
        damping = begun[key].damping
        if damping > asked:
            warn(reporter, variant, f"{linears[0].tensor}: damping raised to {damping:g} to make it solvable")
    tensors = {name: tensor for found, _ in finished for name, tensor in found.items()}
    return tensors, {name: layer for _, found in finished for name, layer in found.items()}


def solve_with_feedback(
    block: Block, rounding: Rounding, pack: Pack, variant: str, reporter: Reporter, threads: int
) -> Solved:
    """See solve_inputs: integers, with one factorization for each input. pack: the tensors of one linear."""
    from quantize.numerics.gptq import collect, factorize, row_tasks

    def begin(weights: list[torch.Tensor], gram: torch.Tensor) -> Begun:
        factor = factorize(gram, rounding.group_size or len(gram), damping=rounding.damping)
        tasks = row_tasks(
            weights, factor, bits=rounding.bits, symmetric=rounding.symmetric, smallest_zero=rounding.smallest_zero
        )

        def finish(rows: Sequence[Any]) -> list[tuple[Mapping[str, torch.Tensor], float, float]]:
            found = collect(weights, rows)
            return [(pack(item.quantized), item.loss, item.nearest_loss) for item in found]

        return Begun(factor.damping, tasks, finish)

    return solve_inputs(block, begin, rounding.damping, variant, reporter, threads)
