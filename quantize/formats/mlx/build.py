"""The MLX format: what mlx-lm loads on Apple silicon, and on a CPU.

In: blocks of the calibration pass. Out: a Hugging Face folder whose linears are words of integers with a scale and a
bias for each group, or of FP4 with a scale. The numbers are those of numerics/gptq.py and floats.py; the folder is
formats/packed/'s. Layout: mlx.core.quantize (ml-explore/mlx, python/src/ops.cpp) and mlx-lm's `quantization` section.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.calibration.budget import BlockMemory
from quantize.events import Reporter, status
from quantize.formats.base import Context, RunLimits, SolveCost
from quantize.formats.folder_build import DTYPE_NAMES, LinearTable, Shape, config_text
from quantize.formats.mlx.options import AFFINE_GROUPS, MlxOptions
from quantize.formats.packed.build import PackedBuilder, Solved, check_group_size, feedback_bytes
from quantize.model.checkpoint import Checkpoint
from quantize.system.process import run_step

if TYPE_CHECKING:
    from quantize.calibration.stream import Block


class MlxBuilder(PackedBuilder):
    """Every mode, solved with error feedback."""

    name = "mlx"
    Options = MlxOptions

    def solve(self, block: Block, context: Context, reporter: Reporter) -> Solved:
        """See formats/mlx/solve.py."""
        from quantize.formats.mlx.solve import solve_block

        threads = context.limits.tasks_at_once
        return solve_block(block, context.options, context.variant, reporter, threads, context.checkpoint.half)

    def solver_bytes(self, block: BlockMemory, options: MlxOptions, threads: int) -> int:
        """Factorizations, and rows with their errors."""
        return feedback_bytes(block, threads)

    def solve_operations(self, cost: SolveCost) -> float:
        """See Builder."""
        return cost.gptq_products + cost.clip_products

    def check(self, checkpoint: Checkpoint, options: MlxOptions) -> None:
        """Inputs must be whole groups. Raises PlanError, CheckpointError."""
        check_group_size(checkpoint, options.group_size, 1, 32, AFFINE_GROUPS)

    def words(self, options: MlxOptions, half: str) -> LinearTable:
        """Words along the inputs, lowest bits first; `weight` keeps its name."""
        bits, group = options.bits, options.group_size

        def table(out: int, width: int) -> dict[str, tuple[str, Shape]]:
            groups = (out, width // group)
            words = {"weight": ("U32", (out, width * bits // 32))}
            if options.mode != "affine":
                return {"scales": ("U8", groups), **words}
            return {"biases": (half, groups), "scales": (half, groups), **words}

        return table

    def config(self, checkpoint: Checkpoint, options: MlxOptions) -> str:
        """config.json, with `quantization` as mlx-lm writes it, and the copy that it puts beside it."""
        found = {"bits": options.bits, "group_size": options.group_size, "mode": options.mode}
        return config_text(checkpoint, found, dtype=DTYPE_NAMES[checkpoint.half], also={"quantization": found})

    def verify(self, folder: Path, checkpoint: Checkpoint, limits: RunLimits, reporter: Reporter) -> Mapping[str, Any]:
        """Independent unpacking by mlx, and greedy generation through mlx-lm."""
        from quantize.formats.mlx.check import check_mlx

        status(reporter, "", "loading in mlx-lm")
        facts: dict[str, Any] = run_step("loading in mlx-lm", reporter, check_mlx, folder, limits.threads, checkpoint)
        return facts
