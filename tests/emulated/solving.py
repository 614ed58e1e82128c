"""What the pass and the solvers ask of a GPU for one block: counted on the emulated one, and what they may ask.

The budgets hold for every architecture: a block differs from another in how many inputs, linears, columns and groups it
has, not in how each is solved. They lie 5 to 10 % above what most blocks take; a loop over rows or experts that comes
back, or a stray .item(), multiplies it. A GPU without kernels is counted, which launches most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantize.calibration.block_reader import TensorSource
from quantize.calibration.stream import Block, stream_blocks
from quantize.events import ListReporter
from quantize.formats.awq.build import AwqOptions
from quantize.formats.awq.build import solve_block as solve_awq
from quantize.formats.gptq.build import GptqOptions
from quantize.formats.gptq.build import solve_block as solve_gptq
from quantize.model.architecture import anatomy_of
from tests.emulated.device import Ledger, emulated_gpu

Layers = dict[str, dict[str, float]]
Solve = Callable[[Block, int], tuple[dict[str, Tensor], Layers]]
SCANNED = 4  # times as many launches, where transformers' layer goes over a sequence piece by piece
SCAN_WAITS = 25  # of such a layer, for each batch
PACKED = 8  # what widths and outputs are multiples of, in both layouts


def gptq(block: Block, group_size: int = 32) -> tuple[dict[str, Tensor], Layers]:
    """Solve a block; its packed tensors, and what each linear loses."""
    options = GptqOptions.model_construct(bits=4, group_size=group_size, symmetric=True, damping=0.01)
    return solve_gptq(block, options, "gptq", ListReporter(), 1)


def awq(block: Block, group_size: int = 32) -> tuple[dict[str, Tensor], Layers]:
    """Solve a block; its packed tensors, folded norms, and what each linear loses."""
    options = AwqOptions.model_construct(bits=4, group_size=group_size, clip=True, rounding="nearest")
    return solve_awq(block, options, 1)


SOLVERS: dict[str, Solve] = {"gptq": gptq, "awq": awq}


@dataclass(frozen=True)
class Asked:
    """Of a device, for one block, by `what`: the pass, or a solver. Launches and syncs, and how many there may be."""

    block: int
    what: str
    launches: int
    syncs: int
    most_launches: int
    most_syncs: int

    @property
    def too_much(self) -> bool:
        """More than it may."""
        return self.launches > self.most_launches or self.syncs > self.most_syncs


@dataclass(frozen=True)
class Counts:
    """What a block's work grows with. columns: of all inputs; groups: of columns that share a scale."""

    inputs: int
    linears: int
    folds: int
    columns: int
    groups: int

    @classmethod
    def of(cls, block: Block, group_size: int) -> Counts:
        """Of all that is solved in a block."""
        layout = block.layout
        columns = sum(len(block.grams[key].matrix) for key in layout.inputs)
        return cls(len(layout.inputs), len(layout.linears), len(layout.groups), columns, columns // group_size)

    def allowed(self, what: str) -> tuple[int, int]:
        """Launches and syncs of a solver."""
        if what == "gptq":
            launches = 3 * self.columns + 90 * self.groups + 85 * self.inputs + 30 * self.linears
            return launches, 4 * self.inputs + 2 * self.linears
        return 1150 * self.inputs + 420 * self.folds, 10 * self.inputs + 50 * self.folds


def solved_on_gpu(
    ledger: Ledger, checkpoint: TensorSource, ids: Sequence[Sequence[int]], *, scans: bool = False
) -> Iterator[tuple[Block, dict[str, Layers], list[Asked]]]:
    """The whole pass on the emulated GPU, and both solvers for each kind of block that it meets.

    Yields a block, what each solver loses of each linear (nothing for a block like an earlier one), and what was asked.
    scans: transformers' own code of a layer goes over pieces of a sequence one after the other.
    """
    anatomy, kinds, before = anatomy_of(checkpoint.config), set[object](), (0, 0)
    batches = len({len(each) for each in ids} if anatomy.together else ids)

    def asked(block: int, what: str, most: tuple[int, int]) -> Asked:
        nonlocal before
        found = Asked(block, what, ledger.launches - before[0], ledger.syncs - before[1], *most)
        before = ledger.launches, ledger.syncs
        return found

    for block in stream_blocks(checkpoint, ids, device="cuda"):
        inputs, routed = len(block.layout.inputs), block.layout.experts is not None
        kind = tuple((linear.module, linear.input) for linear in block.layout.linears)
        template = anatomy.kinds[block.index]
        begins = template not in kinds  # with embeddings, or masks and positions of each length
        forward = batches * (SCANNED if scans else 1) * (100 + 14 * inputs) + (250 if begins else 0)
        waits = (batches if routed else 0) + (12 if begins else 0) + (SCAN_WAITS * batches if scans else 0)
        found, losses = [asked(block.index, "pass", (forward, waits))], dict[str, Layers]()
        for what, solve in SOLVERS.items() if kind not in kinds else ():
            part, group_size = packable(block, folded=what == "awq")
            tensors, losses[what] = solve(part, group_size)
            assert all(tensor.is_cuda for tensor in tensors.values())
            found.append(asked(block.index, what, Counts.of(part, group_size).allowed(what)))
        kinds |= {kind, template}
        yield block, losses, found
        before = ledger.launches, ledger.syncs  # without what its reader asked
        del block


def packable(block: Block, *, folded: bool) -> tuple[Block, int]:
    """A block without the parts whose tiny widths no layout packs, which a build refuses, and a group size for it."""

    def packs(layout: Any) -> bool:
        sizes = [size for linear in layout.linears for size in block.weights[linear.tensor].shape]
        return not any(size % PACKED for size in sizes)

    groups = [group for part in block.layout.pieces(folded=folded) if packs(part) for group in part.groups]
    found = replace(block, layout=replace(block.layout, groups=tuple(groups)))
    widths = [len(block.grams[key].matrix) for key in found.layout.inputs]
    return found, next(size for size in (32, 16, 8) if not any(width % size for width in widths))


def hold_against_cpu(checkpoint: TensorSource, ids: Sequence[Sequence[int]], *, scans: bool = False) -> dict[str, int]:
    """The pass and both solvers on the emulated GPU give the CPU's Gram matrices and losses, on one thread, and ask no
    more than they may. How many blocks each solver had; scans: see solved_on_gpu.
    """
    solved = dict.fromkeys(SOLVERS, 0)
    expected = stream_blocks(checkpoint, ids)
    with emulated_gpu() as ledger:
        for one, (two, losses, asked) in zip(
            expected, solved_on_gpu(ledger, checkpoint, ids, scans=scans), strict=True
        ):
            much = [item for item in asked if item.too_much]
            assert not much, much
            assert all(weight.is_cuda for weight in two.weights.values())
            for key, gram in one.grams.items():
                size = float(gram.matrix.abs().max())
                torch.testing.assert_close(
                    two.grams[key].matrix.cpu(), gram.matrix, rtol=1e-4, atol=1e-4 * max(1, size)
                )
            for what, found in losses.items():
                part, group_size = packable(one, folded=what == "awq")
                solved[what] += 1
                for layer, figures in SOLVERS[what](part, group_size)[1].items():
                    assert found[layer]["loss"] == pytest.approx(figures["loss"], rel=0.02, abs=1e-6)
            del two
    assert len(ledger.threads) == 1, "a GPU's libraries are loaded at their first call, and not for two threads at once"
    return solved
