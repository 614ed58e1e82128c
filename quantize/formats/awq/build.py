"""The AWQ format (gemm layout, quant_method awq): what vLLM, SGLang and transformers with gptqmodel load.

In: blocks of the calibration pass. Out: packed linears whose input channels were scaled to protect what matters, the
inverse scales folded into the norm or linear before them. The numbers are numerics/awq.py's and folding.py's; the
folder is formats/packed/'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from quantize.calibration.budget import BlockMemory
from quantize.events import Reporter, note
from quantize.formats.base import Collector, Context, SolveCost
from quantize.formats.folder_build import STORED_DTYPE, LinearTable, Shape, unquantized_linears
from quantize.formats.packed.build import PackedBuilder, Solved, scaled_bytes
from quantize.formats.packed.scaled import solve_scaled
from quantize.model.architecture import block_layouts
from quantize.model.checkpoint import Checkpoint
from quantize.recipe.model import FormatOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from quantize.calibration.stream import Block
    from quantize.numerics.awq import Reader, ScaleChoice, Tie
    from quantize.numerics.rtn import Quantized


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
        """The folded block, and the search."""
        return scaled_bytes(block, threads, feedback=options.rounding == "gptq")

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


@dataclass(frozen=True)
class AwqScaling:
    """See Scaling."""

    options: AwqOptions
    symmetric: bool = False

    def search(self, readers: Sequence[Reader], tie: Tie | None) -> ScaleChoice:
        """See Scaling."""
        from quantize.numerics.awq import search_scales

        return search_scales(readers, group_size=self.options.group_size, symmetric=self.symmetric, tie=tie)

    def quantize(
        self, weights: list[torch.Tensor], gram: torch.Tensor, scales: torch.Tensor
    ) -> list[tuple[Quantized, float]]:
        """See Scaling."""
        from quantize.numerics.awq import quantize_compensated, quantize_scaled
        from quantize.numerics.gptq import estimated_loss

        size, symmetric = self.options.group_size, self.symmetric
        if self.options.rounding == "gptq":
            solutions = quantize_compensated(weights, gram, scales, group_size=size, symmetric=symmetric)
            found = [solution.quantized for solution in solutions]
        else:
            energy, clip = gram.diagonal(), self.options.clip
            found = quantize_scaled(weights, energy, scales, group_size=size, clip=clip, symmetric=symmetric)
        return [
            (quantized, estimated_loss((quantized.dequantize() - weight) / scales, gram))
            for weight, quantized in zip(weights, found, strict=True)
        ]


def solve_block(block: Block, options: AwqOptions, threads: int, half: str = STORED_DTYPE) -> Solved:
    """Packed linears and folded norms of a block, and what each linear loses: see solve_scaled."""
    return solve_scaled(block, AwqScaling(options), _gemm, threads, half)


def _gemm(quantized: Quantized) -> dict[str, torch.Tensor]:
    from quantize.numerics.packing import pack_awq

    words = pack_awq(quantized)
    return {field: getattr(words, field) for field in ("qweight", "qzeros", "scales")}
