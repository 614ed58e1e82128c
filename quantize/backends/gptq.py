"""The GPTQ format (v1 layout, quant_method gptq): what vLLM, SGLang and transformers with gptqmodel load.

In: blocks of the calibration pass. Out: packed linears solved with their Gram matrices, group-aware order, clip
search. The numbers are numerics/gptq.py's; the folder is backends/packed.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from quantize.backends import packed
from quantize.backends.base import BuildResult, Collector, Context, Limits, SizePlan
from quantize.checkpoint import Checkpoint
from quantize.recipe import BackendOptions
from quantize.report import Reporter, status, warn
from quantize.worker import run_step

if TYPE_CHECKING:
    import torch

    from quantize.activations import Block

Bits = Literal[2, 3, 4, 8]


class GptqOptions(BackendOptions):
    """The recipe section of a GPTQ variant."""

    bits: Bits = 4
    group_size: int = Field(
        128, ge=16, le=1024, description="weights that share a scale; must divide every input width"
    )
    symmetric: bool = Field(True, description="no zero points; what vLLM's Marlin kernels want")
    damping: float = Field(0.01, gt=0, lt=1, description="share of the mean diagonal that is added to the Gram matrix")

    def variant_name(self) -> str:
        """`gptq-int4-g128`, with `-asym` for zero points."""
        return f"gptq-int{self.bits}-g{self.group_size}{'' if self.symmetric else '-asym'}"


class GptqBackend:
    """GPTQ from the shared Gram matrices."""

    name = "gptq"
    extra = "gptqmodel"
    Options = GptqOptions

    def tools(self, options: GptqOptions) -> Sequence[str]:
        """The numerics run on torch; the pass on transformers' layers."""
        return ("torch", "transformers")

    def needs_calibration(self, options: GptqOptions) -> bool:
        """Always."""
        return True

    def check(self, checkpoint: Checkpoint, options: GptqOptions) -> None:
        """Group size and shapes must fit the packed words."""
        multiple = {2: 16, 3: 32, 4: 8, 8: 4}[options.bits]
        packed.check_group_size(checkpoint, options.group_size, multiple, multiple)

    def sizes(self, context: Context, options: Sequence[GptqOptions], reporter: Reporter) -> list[SizePlan]:
        """By arithmetic: the layout fixes every byte."""
        return [
            packed.size_plan(context.checkpoint, _layout(context.checkpoint, item), _config(context.checkpoint, item))
            for item in options
        ]

    def collector(self, context: Context, reporter: Reporter) -> Collector:
        """Solves each block's linears with its Gram matrices."""

        def solve(block: Block) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
            return solve_block(block, context.options, context.variant, reporter)

        return packed.PackedCollector(context, _layout(context.checkpoint, context.options), solve)

    def build(self, context: Context, reporter: Reporter) -> BuildResult:
        """Add config and tokenizer to the shards that the pass wrote."""
        options: GptqOptions = context.options
        files, layers = packed.pass_results(context)
        beside = packed.write_beside(context, _config(context.checkpoint, options))
        size = self.sizes(context, [options], reporter)[0]
        return BuildResult(
            (*files, *beside), size.weights_bytes, options.bits, options.group_size, size.bits_per_weight, size.kept,
            {"layers": layers},
        )  # fmt: skip

    def verify(self, folder: Path, checkpoint: Checkpoint, limits: Limits, reporter: Reporter) -> Mapping[str, Any]:
        """Independent unpacking by gptqmodel, and greedy generation through transformers."""
        from quantize.engines.packed_check import check_packed

        status(reporter, "", "loading in transformers with gptqmodel")
        facts: dict[str, Any] = run_step(
            "loading in transformers", reporter, check_packed, folder, "gptq", limits.threads
        )
        return facts


def solve_block(
    block: Block, options: GptqOptions, variant: str, reporter: Reporter
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Packed tensors of a block's linears, and each one's squared output error; one factorization for each input."""
    from quantize.numerics.gptq import factorize, solve
    from quantize.numerics.packing import pack_gptq

    tensors: dict[str, torch.Tensor] = {}
    layers: dict[str, Any] = {}
    for key, linears in block.layout.inputs.items():
        factor = factorize(block.grams[key].matrix, options.group_size, damping=options.damping)
        if factor.damping > options.damping:
            warn(reporter, variant, f"{linears[0].tensor}: damping raised to {factor.damping:g} to make it solvable")
        weights = [block.weights[linear.tensor] for linear in linears]
        for linear, solution in zip(
            linears, solve(weights, factor, bits=options.bits, symmetric=options.symmetric), strict=True
        ):
            words = pack_gptq(solution.quantized)
            prefix = linear.tensor.removesuffix("weight")
            tensors |= {f"{prefix}{field}": getattr(words, field) for field in ("qweight", "qzeros", "scales", "g_idx")}
            layers[prefix.removesuffix(".")] = {
                "squared_error": round(solution.loss, 6),
                "nearest_squared_error": round(solution.nearest_loss, 6),
                "damping": factor.damping,
            }
    return tensors, layers


def _layout(checkpoint: Checkpoint, options: GptqOptions) -> packed.Layout:
    bits, group_size = options.bits, options.group_size

    def table(out: int, width: int) -> dict[str, tuple[str, packed.Shape]]:
        return {
            "g_idx": ("I32", (width,)),
            "qweight": ("I32", (width * bits // 32, out)),
            "qzeros": ("I32", (width // group_size, out * bits // 32)),
            "scales": ("F16", (width // group_size, out)),
        }

    return packed.plan_layout(checkpoint, table)


def _config(checkpoint: Checkpoint, options: GptqOptions) -> str:
    return packed.config_text(
        checkpoint,
        {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": options.bits,
            "group_size": options.group_size,
            "sym": options.symmetric,
            "desc_act": False,
            "true_sequential": False,
            "lm_head": False,
            "damp_percent": options.damping,
        },
    )
