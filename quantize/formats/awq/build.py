"""The AWQ format (gemm layout, quant_method awq): what vLLM, SGLang and transformers with gptqmodel load.

In: blocks of the calibration pass. Out: packed linears whose input channels were scaled to protect what matters, the
inverse scales folded into the norm or linear before them. The numbers are numerics/awq.py's and folding.py's; the
folder is formats/packed/'s.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from quantize.calibration.budget import BlockMemory
from quantize.events import Reporter, note
from quantize.files.shards import torch_dtype
from quantize.formats.base import Collector, Context, SolveCost
from quantize.formats.folder_build import STORED_DTYPE, LinearTable, Shape, unquantized_linears
from quantize.formats.packed.build import PackedBuilder, Solved, feedback_bytes
from quantize.model.architecture import block_layouts
from quantize.model.checkpoint import Checkpoint
from quantize.model.layout import FoldGroup, Linear, RowsSource
from quantize.numerics.constants import SEARCHED_ROWS
from quantize.recipe.model import FormatOptions
from quantize.system.threads import on_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from quantize.calibration.stream import Block
    from quantize.formats.packed.feedback import Pack
    from quantize.numerics.awq import ScaleChoice
    from quantize.numerics.rtn import Quantized

SAMPLE_COPIES = 6  # of the rows that the ratio search looks at
SAMPLES_BYTES = 60 << 20


class AwqOptions(FormatOptions):
    """The recipe section of an AWQ variant."""

    bits: Literal[4] = 4
    group_size: int = Field(
        128, ge=16, le=1024, description="weights that share a scale; must divide every input width"
    )
    clip: bool = Field(True, description="search for a smaller range than the full one in each group")
    rounding: Literal["nearest", "gptq"] = Field(
        "nearest", description="nearest is AWQ as published; gptq feeds rounding errors forward: better, slower"
    )

    def variant_name(self) -> str:
        """`awq-int4-g128`, with `-noclip` without the clip search and `-gptq` with error feedback."""
        feedback = "-gptq" if self.rounding == "gptq" else ""
        return f"awq-int4-g{self.group_size}{'' if self.clip else '-noclip'}{feedback}"


class AwqBuilder(PackedBuilder):
    """AWQ from the shared Gram matrices."""

    name = "awq"
    folds = True
    Options = AwqOptions

    def collector(self, context: Context, reporter: Reporter) -> Collector:
        """Says first which inputs go without a scale."""
        groups = [group for found in block_layouts(context.checkpoint.config) for group in found.groups]
        without = [group for group in groups if group.source is None]
        if without:
            names = ", ".join(dict.fromkeys(linear.module for group in without for linear in group.linears[:1]))
            text = f"no fold was proved for {len(without)} of {len(groups)} inputs, which are rounded without scales"
            note(reporter, context.variant, f"{text}, with the clip search alone: {names}")
        return super().collector(context, reporter)

    def solve(self, block: Block, context: Context, reporter: Reporter) -> Solved:
        """Scales, folds and rounds."""
        return solve_block(block, context.options, context.limits.tasks_at_once, context.checkpoint.half)

    def solver_bytes(self, block: BlockMemory, options: AwqOptions, threads: int) -> int:
        """The folded block in 16 bit, a few copies of a linear on each thread, and samples for the search."""
        samples = SAMPLE_COPIES * threads * 4 * SEARCHED_ROWS * block.width + SAMPLES_BYTES
        rounding = feedback_bytes(block, threads) if options.rounding == "gptq" else 0
        return block.weights // 2 + max(4 * threads * block.largest + samples, rounding)

    def solve_operations(self, cost: SolveCost) -> float:
        """See Builder."""
        return cost.awq_products + cost.clip_products

    def multiples(self, options: AwqOptions) -> tuple[int, int]:
        """Eight outputs a word."""
        return 8, 1

    def words(self, options: AwqOptions, half: str) -> LinearTable:
        """The gemm layout: words along the output axis."""
        group_size = options.group_size

        def table(out: int, width: int) -> dict[str, tuple[str, Shape]]:
            return {
                "qweight": ("I32", (width, out // 8)),
                "qzeros": ("I32", (width // group_size, out // 8)),
                "scales": (half, (width // group_size, out)),
            }

        return table

    def quantization(self, checkpoint: Checkpoint, options: AwqOptions) -> Mapping[str, Any]:
        """See PackedBuilder."""
        return {"version": "gemm", "zero_point": True, "modules_to_not_convert": unquantized_linears(checkpoint)}


def solve_block(
    block: Block, options: AwqOptions, threads: int, half: str = STORED_DTYPE, pack: Pack | None = None, *,
    symmetric: bool = False,
) -> Solved:  # fmt: skip
    """All tensors of a block that change (packed linears, folded norms and biases), and each linear's loss as a share
    of its output's energy over the calibration tokens. half: the type that norms are stored in. pack: the tensors of
    one linear, by the last part of their names; None for those of the gemm layout.
    """
    from quantize.calibration.folding import fold_block

    groups = [group for group in block.layout.groups if group.source is not None]
    found = on_threads([partial(_search, group, block, options, symmetric) for group in groups], threads)
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
            quantize = partial(_quantize, weights, block.grams[key].matrix, scale, options, symmetric)
            tasks.append(partial(_pack, block, members, quantize, choice, pack or _gemm))
    layers: dict[str, Any] = {}
    for packed_tensors, losses in on_threads(tasks, threads):
        tensors |= packed_tensors
        layers |= losses
    return tensors, layers


def _search(group: FoldGroup, block: Block, options: AwqOptions, symmetric: bool) -> ScaleChoice:
    from quantize.numerics.awq import Reader, Tie, search_scales

    readers = [Reader(block.weights[linear.tensor], block.grams[linear.input]) for linear in group.linears]
    tie = Tie(group.source.head_dim, group.source.repeats) if isinstance(group.source, RowsSource) else None
    return search_scales(readers, group_size=options.group_size, symmetric=symmetric, tie=tie)


def _pack(
    block: Block, members: list[Linear], quantize: Callable[[], list[tuple[Quantized, float]]],
    choice: ScaleChoice | None, pack: Pack,
) -> Solved:  # fmt: skip
    """Packed tensors of scaled weights that read one input, and what each of the linears loses."""
    ratios = {"ratio": choice.ratio, "weight_ratio": choice.weight_ratio} if choice else {}
    tensors: dict[str, torch.Tensor] = {}
    layers: dict[str, Any] = {}
    for linear, (quantized, loss) in zip(members, quantize(), strict=True):
        prefix = linear.tensor.removesuffix("weight")
        tensors |= {f"{prefix}{name}": tensor for name, tensor in pack(quantized).items()}
        layers[prefix.removesuffix(".")] = {"loss": block.share(loss, linear), **ratios}
    return tensors, layers


def _gemm(quantized: Quantized) -> dict[str, torch.Tensor]:
    from quantize.numerics.packing import pack_awq

    words = pack_awq(quantized)
    return {field: getattr(words, field) for field in ("qweight", "qzeros", "scales")}


def _quantize(
    weights: list[torch.Tensor], gram: torch.Tensor, scales: torch.Tensor | None, options: AwqOptions, symmetric: bool
) -> list[tuple[Quantized, float]]:
    """(Quantized, squared output error over the calibration tokens) of scaled weights that read one input."""
    import torch

    from quantize.numerics.awq import quantize_compensated, quantize_scaled
    from quantize.numerics.gptq import estimated_loss

    scales = torch.ones_like(gram.diagonal()) if scales is None else scales
    if options.rounding == "gptq":
        solutions = quantize_compensated(weights, gram, scales, group_size=options.group_size, symmetric=symmetric)
        found = [solution.quantized for solution in solutions]
    else:
        energy = gram.diagonal()
        found = quantize_scaled(
            weights, energy, scales, group_size=options.group_size, clip=options.clip, symmetric=symmetric
        )
    return [
        (quantized, estimated_loss((quantized.dequantize() - weight) / scales, gram))
        for weight, quantized in zip(weights, found, strict=True)
    ]
