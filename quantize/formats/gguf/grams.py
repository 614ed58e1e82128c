"""The Gram matrices of a calibration pass in files, for solving after llama.cpp has quantized.

In: blocks of the pass. Out: beside the importance matrix, a file for each block with the Gram matrix of each of its
inputs, folded (numerics/gram); later each of them again, one at a time. So memory is flat, whatever the depth.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import BuildError, disk_errors
from quantize.formats.gguf.imatrix import ImatrixCollector
from quantize.model.architecture import block_layouts
from quantize.model.checkpoint import Checkpoint
from quantize.model.layout import BlockLayout
from quantize.numerics.constants import folded_shape
from quantize.system.cache import are_whole, hash_file
from quantize.system.files import sync, write_durable

if TYPE_CHECKING:
    import torch

    from quantize.calibration.stream import Block

RECORD_NAME = "grams.json"
VALUE_BYTES = 4  # float32


class GramCollector:
    """Keeps each block's Gram matrices in a file, and what ImatrixCollector keeps."""

    def __init__(self, folder: Path, imatrix: Path) -> None:
        self._folder, self._imatrix = folder, ImatrixCollector(imatrix)
        self._files: dict[str, str] = {}  # name -> sha256

    def pieces(self, layout: BlockLayout) -> Sequence[BlockLayout]:
        """The block whole: one file has its matrices."""
        return self._imatrix.pieces(layout)

    def solve(self, block: Block) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """The diagonals of a block's Gram matrices, and the folded matrices in the order of its inputs."""
        from quantize.numerics.gram import fold

        folded = [fold(block.grams[key].matrix.float().cpu()) for key in block.layout.inputs]
        return self._imatrix.solve(block), folded

    def add(self, index: int, solved: Sequence[tuple[dict[str, torch.Tensor], list[torch.Tensor]]]) -> None:
        """Keep a block's matrices."""
        self._imatrix.add(index, [diagonals for diagonals, _ in solved])
        path = self._folder / _file_name(index)
        with disk_errors(self._folder), path.open("wb") as file:
            for _, folded in solved:
                for matrix in folded:
                    file.write(matrix.numpy().data.cast("B"))
        with disk_errors(self._folder):
            sync(path)
        self._files[path.name] = hash_file(path)

    def state(self) -> dict[str, Any]:
        """The blocks' files and their hashes."""
        return {"imatrix": self._imatrix.state(), "grams": dict(self._files)}

    def resume(self, state: Mapping[str, Any]) -> bool:
        """Go on with the files of a stopped build."""
        files, imatrix = state.get("grams"), state.get("imatrix")
        if not isinstance(files, dict) or not isinstance(imatrix, dict):
            return False
        if not are_whole(self._folder, files) or not self._imatrix.resume(imatrix):
            return False
        self._files = dict(files)
        return True

    def finish(self) -> None:
        """Write what the importance matrix is made of, and which files hold the matrices."""
        self._imatrix.finish()
        with disk_errors(self._folder):
            write_durable(self._folder / RECORD_NAME, json.dumps(self._files, sort_keys=True) + "\n")


def read_gram(folder: Path, checkpoint: Checkpoint, layout: BlockLayout, key: str) -> torch.Tensor:
    """The Gram matrix of an input of a block, [in, in] float32. Raises BuildError: its file is not whole."""
    import numpy as np
    import torch

    from quantize.numerics.gram import unfold

    start, shape = 0, (0, 0)
    for name, width in _widths(checkpoint, layout).items():
        shape = folded_shape(width)
        if name == key:
            break
        start += VALUE_BYTES * math.prod(shape)
    path = folder / _file_name(layout.index)
    with disk_errors(folder):
        values = np.fromfile(path, "<f4", math.prod(shape), offset=start)
    if len(values) != math.prod(shape):
        raise BuildError(f"{path.name} became shorter while it was read", hint="run the same build again")
    return unfold(torch.from_numpy(values.reshape(shape)))


def grams_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all files, from headers. Raises CheckpointError: the architecture is not known."""
    layouts = block_layouts(checkpoint.config)
    shapes = (folded_shape(width) for layout in layouts for width in _widths(checkpoint, layout).values())
    return VALUE_BYTES * sum(map(math.prod, shapes))


def _widths(checkpoint: Checkpoint, layout: BlockLayout) -> dict[str, int]:
    """The width of each input of a block, in order."""
    return {key: checkpoint.tensors[linears[0].tensor].shape[-1] for key, linears in layout.inputs.items()}


def _file_name(index: int) -> str:
    return f"grams.{index:05d}.f32"
