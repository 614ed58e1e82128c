"""The GPTQ format (v1 layout, quant_method gptq): what vLLM, SGLang and transformers with gptqmodel load.

In: blocks of the calibration pass. Out: packed linears solved with their Gram matrices, group-aware order, clip
search. The numbers are numerics/gptq.py's; the folder is formats/packed/'s.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from quantize.calibration.budget import BlockMemory
from quantize.events import Reporter
from quantize.formats.base import Context, SolveCost
from quantize.formats.folder_build import LinearTable, Shape, unquantized_heads
from quantize.formats.packed.build import PackedBuilder, Solved, feedback_bytes
from quantize.formats.packed.feedback import Rounding, solve_with_feedback
from quantize.model.architecture import anatomy_of, block_layouts
from quantize.model.checkpoint import Checkpoint
from quantize.model.towers import tower_modules
from quantize.recipe.model import FormatOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from quantize.calibration.stream import Block
    from quantize.numerics.rtn import Quantized

Bits = Literal[2, 3, 4, 8]
USUAL_BLOCKS = "model.layers"  # which every loader looks for


class GptqOptions(FormatOptions):
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


class GptqBuilder(PackedBuilder):
    """GPTQ from the shared Gram matrices."""

    name = "gptq"
    Options = GptqOptions

    def solve(self, block: Block, context: Context, reporter: Reporter) -> Solved:
        """Rounds with error feedback under each input's Gram matrix."""
        return solve_block(block, context.options, context.variant, reporter, context.limits.tasks_at_once)

    def solver_bytes(self, block: BlockMemory, options: GptqOptions, threads: int) -> int:
        """Factorizations, and rows with their errors."""
        return feedback_bytes(block, threads)

    def solve_operations(self, cost: SolveCost) -> float:
        """See Builder."""
        return cost.gptq_products + cost.clip_products

    def multiples(self, options: GptqOptions) -> tuple[int, int]:
        """Both axes are packed: weights along the inputs, zero points along the outputs."""
        multiple = {2: 16, 3: 32, 4: 8, 8: 4}[options.bits]
        return multiple, multiple

    def words(self, options: GptqOptions, half: str) -> LinearTable:
        """The v1 layout: words along the input axis."""
        bits, group_size = options.bits, options.group_size

        def table(out: int, width: int) -> dict[str, tuple[str, Shape]]:
            return {
                "g_idx": ("I32", (width,)),
                "qweight": ("I32", (width * bits // 32, out)),
                "qzeros": ("I32", (width // group_size, out * bits // 32)),
                "scales": (half, (width // group_size, out)),
            }

        return table

    def quantization(self, checkpoint: Checkpoint, options: GptqOptions) -> Mapping[str, Any]:
        """See PackedBuilder. `dynamic` names what is not quantized, as vLLM, SGLang and gptqmodel read it."""
        dynamic: dict[str, Any] = {f"-:^{re.escape(module)}\\.": {} for module in unquantized_heads(checkpoint)}
        dynamic |= {f"-:^(.*\\.)?{re.escape(module)}\\.": {} for module in tower_modules(checkpoint)}
        return {
            "checkpoint_format": "gptq",
            "sym": options.symmetric,
            "desc_act": False,
            "true_sequential": False,
            "lm_head": False,
            "damp_percent": options.damping,
            **_for_loaders(checkpoint, dynamic),
        }


def _for_loaders(checkpoint: Checkpoint, dynamic: dict[str, Any]) -> dict[str, Any]:
    """Where the blocks are, and which of their linears are packed, where loaders would not find it out by themselves.
    dynamic: what else is not quantized.

    optimum, by which transformers loads, takes `block_name_to_quantize` and `modules_in_block_to_quantize`; gptqmodel
    and vLLM take `dynamic`. Of mixtures all is left to them.
    """
    found, layouts = anatomy_of(checkpoint.config), list(block_layouts(checkpoint.config))
    told: dict[str, Any] = {} if found.blocks == USUAL_BLOCKS else {"block_name_to_quantize": found.blocks}
    told |= {"dynamic": dynamic} if dynamic else {}
    if any(layout.experts for layout in layouts):
        return told
    kept = {
        name.removeprefix(layout.prefix).removesuffix(".weight")
        for layout in layouts for name, _ in layout.kept
        if name.endswith(".weight") and name in checkpoint.tensors and len(checkpoint.tensors[name].shape) == 2
    }  # fmt: skip
    if kept:
        packed = dict.fromkeys(linear.module for layout in layouts for linear in layout.linears)
        told["modules_in_block_to_quantize"] = [list(packed)]
        told["dynamic"] = dynamic | {f"-:.*\\.{re.escape(name)}$": {} for name in sorted(kept)}
    return told


def solve_block(block: Block, options: GptqOptions, variant: str, reporter: Reporter, threads: int) -> Solved:
    """Packed tensors of a block's linears, and what each one loses: see solve_with_feedback."""
    rounding = Rounding(options.bits, options.group_size, options.symmetric, options.damping)
    return solve_with_feedback(block, rounding, _packed, variant, reporter, threads)


def _packed(quantized: Quantized) -> dict[str, torch.Tensor]:
    from quantize.numerics.packing import pack_gptq

    words = pack_gptq(quantized)
    return {field: getattr(words, field) for field in ("qweight", "qzeros", "scales", "g_idx")}
