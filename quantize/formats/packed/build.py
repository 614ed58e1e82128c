"""How the GPTQ and AWQ formats are built: a Hugging Face folder whose block linears are packed integers.

In: a checkpoint, the names of a packed linear's tensors, blocks as the pass yields them. Out: safetensors shards in
a fixed order, what folder_build.py writes beside them. Which integers is left to the two builders.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.calibration.budget import BlockMemory
from quantize.errors import BuildError, PlanError
from quantize.events import Reporter, status
from quantize.files.shards import ShardWriter, files_bytes, torch_dtype
from quantize.formats.base import BuildResult, Collector, Context, RunLimits, SizePlan, SolveCost
from quantize.formats.folder_build import (
    DTYPE_NAMES,
    LinearTable,
    TensorLayout,
    config_text,
    left_out,
    linear_shapes,
    plan_layout,
    size_plan,
    stored_in,
    write_beside,
)
from quantize.model.architecture import anatomy_of
from quantize.model.checkpoint import Checkpoint
from quantize.model.layout import BlockLayout
from quantize.numerics.constants import SEARCHED_ROWS, SOLVED_ROWS
from quantize.system.memory import give_back_freed
from quantize.system.process import run_step

if TYPE_CHECKING:
    import torch

    from quantize.calibration.stream import Block

Solved = tuple["dict[str, torch.Tensor]", dict[str, Any]]  # tensors that change, by full name; loss of each linear
RESULTS_NAME = "pass.json"
SAMPLE_COPIES = 6  # of the rows that a search for scales looks at
SAMPLES_BYTES = 60 << 20
GROUP_SIZES = (16, 32, 64, 128, 256)  # that are named where another one does not fit
CHECKED_ELEMENTS = 1 << 20  # of a tensor, looked at together for values beyond the range of 16 bits


def check_group_size(
    checkpoint: Checkpoint, group_size: int, out_multiple: int, in_multiple: int, sizes: Sequence[int] = GROUP_SIZES
) -> None:
    """Refuse a group size or a shape that the packed layout can't hold. sizes: those that a recipe may have.

    Raises PlanError, CheckpointError.
    """
    for name, out, width in linear_shapes(checkpoint):
        if width % group_size:
            fits = ", ".join(str(size) for size in sizes if width % size == 0)
            other = str(width) if sizes == GROUP_SIZES else "none that the format has"
            raise PlanError(
                f"group_size {group_size} does not divide the {width} inputs of {name}",
                hint=f"sizes that do: {fits or other}",
            )
        if out % out_multiple or width % in_multiple:
            raise PlanError(f"{name} is {out} x {width}; packing needs multiples of {out_multiple} x {in_multiple}")


def feedback_bytes(block: BlockMemory, threads: int) -> int:
    """What rounding with error feedback takes: factorizations under way, or rows, and the factors of all inputs."""
    factorizing = 4 * sum(block.grams[:threads])
    rows = 8 * threads * 4 * SOLVED_ROWS * block.width
    return max(factorizing, rows) + sum(block.grams) + block.stacked


def scaled_bytes(block: BlockMemory, threads: int, *, feedback: bool) -> int:
    """What scaling channels first takes: the folded block in 16 bits, a few copies of a linear on each thread, samples
    for the search. feedback: scaled weights are rounded with error feedback.
    """
    samples = SAMPLE_COPIES * threads * 4 * SEARCHED_ROWS * block.width + SAMPLES_BYTES
    rounding = feedback_bytes(block, threads) if feedback else 0
    return block.weights // 2 + max(4 * threads * block.largest + samples, rounding)


class PackedCollector:
    """Writes the artifact's shards while the pass goes on; `solve` turns one block into its tensors."""

    def __init__(
        self, context: Context, layout: TensorLayout, solve: Callable[[Block], Solved], *, folds: bool
    ) -> None:
        self._context, self._layout, self._folds = context, layout, folds
        self._anatomy = anatomy_of(context.checkpoint.config)
        self.solve = solve
        self._writer = ShardWriter(context.staging, layout.table)
        self._names: Iterator[str] = iter(layout.table)
        self._pending: str | None = next(self._names, None)
        self._layers: dict[str, Any] = {}

    def pieces(self, layout: BlockLayout) -> Sequence[BlockLayout]:
        """Each group of linears, or those that a fold keeps together."""
        return layout.pieces(folded=self._folds)

    def add(self, index: int, solved: Sequence[Solved]) -> None:
        """Append a block's tensors to the shards; those that `solve` did not change are the source's."""
        self._copy_until(index)
        tensors: dict[str, torch.Tensor] = {}
        for changed, losses in solved:
            tensors |= changed
            self._layers |= losses
        while self._pending is not None and self._block(self._pending) == index:
            tensor = tensors.get(self._pending)
            self._write(self._context.checkpoint.read(self._pending) if tensor is None else tensor)

    def state(self) -> dict[str, Any]:
        """How far the shards are, and each linear's loss so far."""
        return {"shards": self._writer.state(), "layers": self._layers}

    def resume(self, state: Mapping[str, Any]) -> bool:
        """Go on with shards that a stopped build left."""
        layers = state.get("layers")
        if not isinstance(layers, dict) or not self._writer.resume(state.get("shards", {})):
            return False
        self._layers = layers
        self._names = iter([*self._layout.table][self._writer.written :])
        self._pending = next(self._names, None)
        return True

    def finish(self) -> None:
        """Write what follows the blocks, and leave the pass's results for the build."""
        self._copy_until(None)
        files = self._writer.finish()
        data = {"files": files, "layers": self._layers}
        (self._context.scratch / RESULTS_NAME).write_text(json.dumps(data, sort_keys=True), encoding="utf-8")

    def _block(self, name: str) -> int | None:
        return self._anatomy.block_of(name)

    def _copy_until(self, block: int | None) -> None:
        """Copy tensors from the source up to the first one of `block`."""
        while self._pending is not None and (block is None or self._block(self._pending) != block):
            give_back_freed()  # an embedding may be larger than all that solving a block took
            self._write(self._context.checkpoint.read(self._pending))

    def _write(self, tensor: torch.Tensor) -> None:
        import torch

        assert self._pending is not None
        if tensor.is_floating_point():
            stored = self._layout.table[self._pending][0]
            tensor = tensor.to(torch_dtype(stored))
            pieces = torch.split(tensor.reshape(-1), CHECKED_ELEMENTS)  # a whole embedding takes twice its memory
            if tensor.itemsize > 1 and not all(bool(torch.isfinite(piece).all()) for piece in pieces):
                hint = "the model has weights beyond its range, or folding a scale made them so: another format may do"
                raise BuildError(f"tensor {self._pending} does not fit {stored}", hint=hint)
        self._writer.write(self._pending, tensor)
        self._pending = next(self._names, None)


class PackedBuilder:
    """What a format of packed integers does whatever its integers are, but for what is not implemented here."""

    name: str
    Options: type[Any]
    source_copies = 0
    computes_in_half = True
    folds = False

    def folds_scales(self, options: Any) -> bool:
        """Whether a group's scales go into the rows of another."""
        return self.folds

    def words(self, options: Any, half: str) -> LinearTable:
        """What a linear becomes. half: the type of scales."""
        raise NotImplementedError

    def multiples(self, options: Any) -> tuple[int, int]:
        """What outputs and inputs of a linear must be multiples of to be packed."""
        raise NotImplementedError

    def quantization(self, checkpoint: Checkpoint, options: Any) -> Mapping[str, Any]:
        """What config.json says beside the method, the bits and the group size."""
        raise NotImplementedError

    def solve(self, block: Block, context: Context, reporter: Reporter) -> Solved:
        """Tensors of a block that change, and each linear's loss."""
        raise NotImplementedError

    def solver_bytes(self, block: BlockMemory, options: Any, threads: int) -> int:
        """What `solve` takes beside the block."""
        raise NotImplementedError

    def solve_operations(self, cost: SolveCost) -> float:
        """See Builder."""
        raise NotImplementedError

    def check(self, checkpoint: Checkpoint, options: Any) -> None:
        """Group size and shapes must fit the packed words."""
        check_group_size(checkpoint, options.group_size, *self.multiples(options))

    def layout(self, checkpoint: Checkpoint, options: Any) -> TensorLayout:
        """Every tensor of the artifact."""
        half = checkpoint.half
        return plan_layout(checkpoint, self.words(options, half), half)

    def config(self, checkpoint: Checkpoint, options: Any) -> str:
        """config.json, with the quantization_config that transformers, vLLM and SGLang read."""
        known = {"quant_method": self.name, "bits": options.bits, "group_size": options.group_size}
        found = {**known, **self.quantization(checkpoint, options)}
        return config_text(checkpoint, found, dtype=DTYPE_NAMES[checkpoint.half])

    def tools(self, options: Any) -> Sequence[str]:
        """The numerics run on torch; the pass on transformers' layers."""
        return ("torch", "transformers")

    def needs_calibration(self, options: Any) -> bool:
        """Always."""
        return True

    def sizes(self, context: Context, options: Sequence[Any], reporter: Reporter) -> list[SizePlan]:
        """By arithmetic: the layout fixes every byte."""
        checkpoint, plans = context.checkpoint, []
        for item in options:
            layout = self.layout(checkpoint, item)
            plan = size_plan(checkpoint, layout, self.config(checkpoint, item), checkpoint.half)
            plans.append(replace(plan, pass_bytes=files_bytes(layout.table)))
        return plans

    def collector(self, context: Context, reporter: Reporter) -> Collector:
        """Solves each block as the pass yields it."""
        layout = self.layout(context.checkpoint, context.options)
        folds = self.folds_scales(context.options)
        return PackedCollector(context, layout, lambda block: self.solve(block, context, reporter), folds=folds)

    def build(self, context: Context, reporter: Reporter) -> BuildResult:
        """Add config and tokenizer to the shards that the pass wrote."""
        results = json.loads((context.scratch / RESULTS_NAME).read_text(encoding="utf-8"))
        return self.finished(context, results["files"], {"layers": results["layers"]}, reporter)

    def finished(
        self, context: Context, files: Sequence[str], measurements: Mapping[str, Any], reporter: Reporter
    ) -> BuildResult:
        """The result, once the shards are written; writes what lies beside them."""
        options = context.options
        beside = write_beside(context, self.config(context.checkpoint, options))
        size = self.sizes(context, [options], reporter)[0]
        return BuildResult(
            (*files, *beside), size.weights_bytes, options.bits, options.group_size, size.bits_per_weight,
            size.kept, measurements, left_out=left_out(context.checkpoint), stored=stored_in(context.checkpoint),
        )  # fmt: skip

    def intermediates(self, context: Context) -> Sequence[tuple[str, str]]:
        """None."""
        return ()

    def verify(self, folder: Path, checkpoint: Checkpoint, limits: RunLimits, reporter: Reporter) -> Mapping[str, Any]:
        """Independent unpacking by gptqmodel, and greedy generation through transformers."""
        from quantize.formats.packed.check import check_packed

        status(reporter, "", "loading in transformers with gptqmodel")
        facts: dict[str, Any] = run_step(
            "loading in transformers", reporter, check_packed, folder, self.name, limits.threads, checkpoint,
            self.folds, limits.place.device,
        )
        return facts
