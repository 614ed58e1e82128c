"""A block's linears with their input channels scaled first, the inverse folded into what feeds them.

In: a block of the calibration pass, and a Scaling. Out: all tensors of the block that change, and what each linear
loses. Which scales are chosen, and how scaled weights are rounded, is the Scaling's; the fold is calibration/folding's.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from quantize.files.shards import torch_dtype
from quantize.formats.packed.build import Solved
from quantize.model.layout import FoldGroup, Linear, RowsSource
from quantize.system.threads import on_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from quantize.calibration.stream import Block
    from quantize.formats.packed.feedback import Pack
    from quantize.numerics.awq import Reader, ScaleChoice, Tie
    from quantize.numerics.rtn import Quantized


class Scaling(Protocol):
    """How channels are scaled, and scaled weights are rounded."""

    def search(self, readers: Sequence[Reader], tie: Tie | None) -> ScaleChoice:
        """The scales of the channels that these weights share."""

    def quantize(
        self, weights: list[torch.Tensor], gram: torch.Tensor, scales: torch.Tensor
    ) -> list[tuple[Quantized, float]]:
        """(Quantized, squared output error over the calibration tokens) of scaled weights that read one input."""


def solve_scaled(block: Block, scaling: Scaling, pack: Pack, threads: int, half: str) -> Solved:
    """All tensors of a block that change (packed linears, folded norms and biases), and each linear's loss as a share
    of its output's energy over the calibration tokens. half: the type that norms are stored in. pack: the tensors of
    one linear, by the last part of their names.
    """
    from quantize.calibration.folding import fold_block

    groups = [group for group in block.layout.groups if group.source is not None]
    found = on_threads([partial(_search, group, block, scaling) for group in groups], threads)
    choices = {group.name: choice for group, choice in zip(groups, found, strict=True)}
    dtypes = dict.fromkeys(block.weights, torch_dtype(half))
    scales = {name: choice.scales for name, choice in choices.items()}
    folded = fold_block(block.layout, block.weights, scales, dtypes)
    tensors = {name: folded.weights[name] for name in folded.changed}
    tasks = []
    for group in block.layout.groups:
        for key in dict.fromkeys(linear.input for linear in group.linears):
            members = [linear for linear in group.linears if linear.input == key]
            weights = [folded.weights[linear.tensor] for linear in members]
            scale, choice = folded.scales.get(group.name), choices.get(group.name)
            tasks.append(partial(_pack, block, scaling, members, weights, scale, choice, pack))
    layers: dict[str, Any] = {}
    for packed_tensors, losses in on_threads(tasks, threads):
        tensors |= packed_tensors
        layers |= losses
    return tensors, layers


def _search(group: FoldGroup, block: Block, scaling: Scaling) -> ScaleChoice:
    from quantize.numerics.awq import Reader, Tie

    readers = [Reader(block.weights[linear.tensor], block.grams[linear.input]) for linear in group.linears]
    tie = Tie(group.source.head_dim, group.source.repeats) if isinstance(group.source, RowsSource) else None
    return scaling.search(readers, tie)


def _pack(
    block: Block, scaling: Scaling, members: list[Linear], weights: list[torch.Tensor], scales: torch.Tensor | None,
    choice: ScaleChoice | None, pack: Pack,
) -> Solved:  # fmt: skip
    """Packed tensors of scaled weights that read one input, and what each of the linears loses."""
    import torch

    gram = block.grams[members[0].input].matrix
    scales = torch.ones_like(gram.diagonal()) if scales is None else scales
    ratios = {"ratio": choice.ratio, "weight_ratio": choice.weight_ratio} if choice else {}
    tensors: dict[str, torch.Tensor] = {}
    layers: dict[str, Any] = {}
    for linear, (quantized, loss) in zip(members, scaling.quantize(weights, gram, scales), strict=True):
        prefix = linear.tensor.removesuffix("weight")
        tensors |= {f"{prefix}{name}": tensor for name, tensor in pack(quantized).items()}
        layers[prefix.removesuffix(".")] = {"loss": block.share(loss, linear), **ratios}
    return tensors, layers
