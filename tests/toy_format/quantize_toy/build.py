"""How toy artifacts are made and checked: rounded to nearest, or with ranges chosen in the calibration pass.

In: a checkpoint and options. Out: rows.npz, and what every folder of a model has beside its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from quantize.calibration.budget import BlockMemory
from quantize.errors import PlanError, VerifyError
from quantize.events import Reporter, progress
from quantize.formats.base import BuildResult, Collector, Context, KeptTensor, RunLimits, SizePlan, UncalibratedBuilder
from quantize.formats.folder_build import config_text, copied_files, write_beside
from quantize.model.architecture import block_layouts
from quantize.model.checkpoint import Checkpoint
from quantize.model.layout import BlockLayout
from quantize.recipe.model import FormatOptions
from quantize.runtimes.base import ModelRef
from quantize.system.process import run_step
from quantize_toy.container import CODES, MOST_BYTES, NAME, SCALES, Table, ToyFile, array_bytes, file_bytes, write

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quantize.calibration.stream import Block

    Solved = dict[str, NDArray[Any]]

KEPT = {"F16": ("F16", "<f2"), "F32": ("F32", "<f4"), "BF16": ("F32", "<f4")}  # numpy knows no bfloat16
REASON = "only the matrices of the blocks are rounded"


class ToyOptions(FormatOptions):
    """The recipe section of a toy variant."""

    search: bool = Field(False, description="choose each row's range by what the calibration pass saw")

    def variant_name(self) -> str:
        """`toy-int8`, or `toy-int8-searched`."""
        return "toy-int8-searched" if self.search else "toy-int8"


class ToyBuilder(UncalibratedBuilder):
    """See Builder. It is calibrated where `search` is, and leaves the rest to its base."""

    name = "toy"
    Options = ToyOptions

    def tools(self, options: ToyOptions) -> Sequence[str]:
        """numpy rounds; the statistics are those of torch and transformers."""
        return ("numpy", "torch", "transformers") if options.search else ("numpy",)

    def needs_calibration(self, options: ToyOptions) -> bool:
        """See Builder."""
        return options.search

    def check(self, checkpoint: Checkpoint, options: ToyOptions) -> None:
        """Refuse what the container or the runtime can't take."""
        if any(layout.experts for layout in block_layouts(checkpoint.config)):
            raise PlanError(f"the toy format has no experts, {checkpoint.architecture} does", hint="use gguf")
        if file_bytes(_table(checkpoint)) > MOST_BYTES:
            raise PlanError("the toy format holds 2 GiB at most", hint="it is a toy: use another format")

    def sizes(self, context: Context, options: Sequence[ToyOptions], reporter: Reporter) -> list[SizePlan]:
        """By arithmetic, and the same for all."""
        return [_size(context.checkpoint)] * len(options)

    def collector(self, context: Context, reporter: Reporter) -> Collector:
        """See Builder."""
        return ToyCollector(context.scratch)

    def solver_bytes(self, block: BlockMemory, options: ToyOptions, threads: int) -> int:
        """A few copies of the largest linear."""
        return 4 * block.largest

    def build(self, context: Context, reporter: Reporter) -> BuildResult:
        """In a worker: it reads tensors with torch."""
        checkpoint, options = context.checkpoint, context.options
        solved = context.scratch if options.search else None
        run_step("rounding rows", reporter, write_artifact, checkpoint, context.staging / NAME, solved, context.variant)
        beside, size = write_beside(context, _config(checkpoint)), _size(checkpoint)
        return BuildResult((NAME, *beside), size.weights_bytes, 8, None, size.bits_per_weight, size.kept)

    def verify(self, folder: Path, checkpoint: Checkpoint, limits: RunLimits, reporter: Reporter) -> Mapping[str, Any]:
        """Every row within half a step of the source's, or clipped; loaded, and the same greedy answer twice."""
        return run_step("loading the toy", reporter, check_artifact, folder, checkpoint, limits.threads)


class ToyCollector:
    """See Collector: the arrays of a solved block are a file in the scratch folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._done = folder, 0

    def pieces(self, layout: BlockLayout) -> Sequence[BlockLayout]:
        """Every linear is solved for itself."""
        return layout.pieces(folded=False)

    def solve(self, block: Block) -> Solved:
        """Codes and scales of each linear."""
        from quantize_toy.rounding import round_rows

        arrays: Solved = {}
        for linear in block.layout.linears:
            weight = block.weights[linear.tensor].float().cpu().numpy()
            importance = block.grams[linear.input].matrix.diagonal().cpu().numpy()
            name = linear.tensor.removesuffix(".weight")
            arrays[name + CODES], arrays[name + SCALES] = round_rows(weight, importance)
        return arrays

    def add(self, index: int, solved: Sequence[Solved]) -> None:
        """One file for the block."""
        write(_solved_path(self._folder, index), (item for arrays in solved for item in arrays.items()))
        self._done = index + 1

    def state(self) -> dict[str, Any]:
        """How many blocks are there."""
        return {"blocks": self._done}

    def resume(self, state: Mapping[str, Any]) -> bool:
        """Go on behind the blocks that an earlier run left."""
        done = state.get("blocks")
        if not isinstance(done, int) or not all(_solved_path(self._folder, index).is_file() for index in range(done)):
            return False
        self._done = done
        return True

    def finish(self) -> None:
        """Nothing: the build reads the files."""


def write_artifact(reporter: Reporter, checkpoint: Checkpoint, path: Path, solved: Path | None, variant: str) -> None:
    """Write rows.npz. solved: the folder with the files of the pass; None rounds to nearest."""
    layouts = block_layouts(checkpoint.config)
    files = [ToyFile(_solved_path(solved, layout.index)) for layout in layouts] if solved else []
    ready = {name: file for file in files for name in file.linears}
    write(path, _arrays(reporter, checkpoint, ready, variant))


def _arrays(
    reporter: Reporter, checkpoint: Checkpoint, ready: Mapping[str, ToyFile], variant: str
) -> Iterator[tuple[str, NDArray[Any]]]:
    from quantize_toy.rounding import round_rows

    table = _table(checkpoint)
    for done, tensor in enumerate(sorted(checkpoint.tensors), start=1):
        name = tensor.removesuffix(".weight")
        if tensor in table:
            yield tensor, checkpoint.read(tensor).float().numpy().astype(table[tensor][0])
        elif name in ready:
            yield from ((name + part, ready[name].array(name + part)) for part in (CODES, SCALES))
        else:
            codes, scales = round_rows(checkpoint.read(tensor).float().numpy())
            yield from ((name + CODES, codes), (name + SCALES, scales))
        progress(reporter, variant, "rounding rows, tensors", done, len(checkpoint.tensors))


def check_artifact(reporter: Reporter, folder: Path, checkpoint: Checkpoint, threads: int) -> dict[str, Any]:
    """What `verify` says, in a worker. numpy's own reader is what the file is read with here."""
    import numpy as np
    import torch

    from quantize.runtimes.transformers.generate import generate_twice, read_prompt
    from quantize_toy.runtime import ToyKind

    torch.set_num_threads(threads)
    file, arrays = ToyFile(folder / NAME), np.load(folder / NAME)
    for name in file.linears:
        codes, scales = arrays[name + CODES], arrays[name + SCALES][:, None]
        far = np.abs(codes * scales - checkpoint.read(f"{name}.weight").float().numpy())
        if not (np.isfinite(scales).all() and (far <= 0.51 * scales)[np.abs(codes) < 127].all()):
            raise VerifyError(f"{folder.name}: {name} is not the source's", hint="build or pull it again")
    loaded = ToyKind().load(ModelRef(folder, "toy", NAME), "cpu")
    tokens = generate_twice(loaded.model, folder, read_prompt(folder))
    return {"runtime": ToyKind().name, "linears": len(file.linears), "tokens": tokens}


def _table(checkpoint: Checkpoint) -> Table:
    """The arrays that an artifact has, from headers alone."""
    rounded = {linear.tensor for layout in block_layouts(checkpoint.config) for linear in layout.linears}
    table: Table = {}
    for tensor in sorted(checkpoint.tensors):
        shape, name = checkpoint.tensors[tensor].shape, tensor.removesuffix(".weight")
        if tensor in rounded:
            table |= {name + CODES: ("|i1", shape), name + SCALES: ("<f4", shape[:1])}
        else:
            table[tensor] = (KEPT[checkpoint.dtype][1], shape)
    return table


def _size(checkpoint: Checkpoint) -> SizePlan:
    table, config = _table(checkpoint), _config(checkpoint)
    beside = sum(path.stat().st_size for path in copied_files(checkpoint)) + len(config.encode())
    dtype = KEPT[checkpoint.dtype][0]
    kept = tuple(KeptTensor(name, dtype, REASON) for name in sorted(checkpoint.tensors) if name in table)
    weights = array_bytes(table)
    bits = round(8 * weights / checkpoint.parameters, 4)
    return SizePlan(file_bytes(table) + beside, weights, len(table), bits, kept)


def _config(checkpoint: Checkpoint) -> str:
    return config_text(checkpoint, {"quant_method": "toy"}, dtype="float32")


def _solved_path(folder: Path, index: int) -> Path:
    return folder / f"block-{index}.npz"
