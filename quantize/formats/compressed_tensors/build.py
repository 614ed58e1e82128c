"""The compressed-tensors format, as llm-compressor writes it: what vLLM and SGLang load.

In: blocks of the calibration pass, or for FP8 the checkpoint alone. Out: a Hugging Face folder whose linears are packed
integers, FP8 or FP4. The numbers are those of numerics/gptq.py, awq.py and floats.py; the folder is formats/packed/'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.calibration.budget import BlockMemory
from quantize.errors import PlanError
from quantize.events import Reporter, status
from quantize.formats.base import BuildResult, Context, RunLimits, SolveCost
from quantize.formats.compressed_tensors.layouts import table_of
from quantize.formats.compressed_tensors.options import GROUP_SIZES, CompressedTensorsOptions
from quantize.formats.compressed_tensors.schemes import GROUPED, config_groups
from quantize.formats.folder_build import DTYPE_NAMES, LinearTable, config_text, linear_shapes, unquantized_linears
from quantize.formats.packed.build import PackedBuilder, Solved, check_group_size, feedback_bytes, scaled_bytes
from quantize.model.checkpoint import Checkpoint
from quantize.system.process import run_step

if TYPE_CHECKING:
    from quantize.calibration.stream import Block


class CompressedTensorsBuilder(PackedBuilder):
    """Every scheme: solved against Gram matrices, or rounded one tensor after another."""

    name = "compressed-tensors"
    Options = CompressedTensorsOptions

    def folds_scales(self, options: CompressedTensorsOptions) -> bool:
        """AWQ and SmoothQuant put the inverse of their scales into norms and neighbors."""
        return options.folds

    def needs_calibration(self, options: CompressedTensorsOptions) -> bool:
        """FP8 is rounded to nearest."""
        return options.kind.calibrated

    def tools(self, options: CompressedTensorsOptions) -> Sequence[str]:
        """The pass runs on transformers' layers."""
        return ("torch", "transformers") if options.kind.calibrated else ("torch",)

    def solve(self, block: Block, context: Context, reporter: Reporter) -> Solved:
        """With error feedback, or AWQ's scales."""
        from quantize.formats.compressed_tensors.solve import solve_block

        limits, options = context.limits, context.options
        return solve_block(block, options, context.variant, reporter, limits.tasks_at_once, context.checkpoint.half)

    def solver_bytes(self, block: BlockMemory, options: CompressedTensorsOptions, threads: int) -> int:
        """Factorizations and rows with their errors; a folded block, and samples of the search for scales."""
        if not options.folds:
            return feedback_bytes(block, threads)
        return scaled_bytes(block, threads, feedback=options.smooth)

    def solve_operations(self, cost: SolveCost) -> float:
        """See Builder; the costlier of the two methods."""
        return max(cost.gptq_products, cost.awq_products) + cost.clip_products

    def check(self, checkpoint: Checkpoint, options: CompressedTensorsOptions) -> None:
        """Inputs must be whole groups, of weights or of activations. Raises PlanError, CheckpointError."""
        if options.scheme in GROUPED:
            check_group_size(checkpoint, options.group_size or 0, 1, 1, GROUP_SIZES)
        groups = [item["group_size"] for item in (options.kind.weights, options.kind.inputs) if item]
        _check_width(checkpoint, options.scheme, max((size or 1 for size in groups), default=1))

    def words(self, options: CompressedTensorsOptions, half: str) -> LinearTable:
        """See PackedBuilder."""
        return table_of(options, half)

    def config(self, checkpoint: Checkpoint, options: CompressedTensorsOptions) -> str:
        """config.json, with the quantization_config that llm-compressor writes."""
        found = {
            "quant_method": self.name,
            "format": options.kind.layout,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": unquantized_linears(checkpoint),
            "config_groups": config_groups(options.scheme, options.group_size),
        }
        return config_text(checkpoint, found, dtype=DTYPE_NAMES[checkpoint.half])

    def build(self, context: Context, reporter: Reporter) -> BuildResult:
        """After the pass, or one tensor after another in a worker."""
        if context.options.kind.calibrated:
            return super().build(context, reporter)
        from quantize.formats.compressed_tensors.steps import write_rounded

        text = f"rounding to {context.options.scheme}"
        status(reporter, context.variant, text)
        layout = self.layout(context.checkpoint, context.options)
        files, device = run_step(text, reporter, write_rounded, context, layout)
        return replace(self.finished(context, files, {}, reporter), device=device)

    def finished(
        self, context: Context, files: Sequence[str], measurements: Mapping[str, Any], reporter: Reporter
    ) -> BuildResult:
        """With the group of the scheme, where a recipe has none to choose."""
        found = super().finished(context, files, measurements, reporter)
        return replace(found, group_size=context.options.shared)

    def verify(self, folder: Path, checkpoint: Checkpoint, limits: RunLimits, reporter: Reporter) -> Mapping[str, Any]:
        """Independent unpacking by compressed-tensors, and greedy generation through transformers."""
        from quantize.formats.compressed_tensors.check import check_compressed

        status(reporter, "", "loading in transformers with compressed-tensors")
        facts: dict[str, Any] = run_step(
            "loading in transformers", reporter, check_compressed, folder, limits.threads, checkpoint,
            limits.place.device,
        )
        return facts


def _check_width(checkpoint: Checkpoint, scheme: str, group: int) -> None:
    """Raises PlanError: an input that is not whole groups."""
    for name, _, width in linear_shapes(checkpoint):
        if width % group:
            raise PlanError(
                f"{scheme} has groups of {group}, which do not divide the {width} inputs of {name}",
                hint="FP8_DYNAMIC and W8A8 take any width",
            )
