"""The GGUF builder's part in the calibration pass: the diagonal of every Gram matrix, as an importance matrix.

In: blocks of the pass. Out: first sums by Hugging Face names in a scratch file, then llama.cpp's imatrix file, once
the 16-bit file is there, which says what each tensor is called and how its columns are ordered.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import BuildError, disk_errors
from quantize.files.gguf import read_gguf
from quantize.files.imatrix import write_imatrix
from quantize.formats.gguf.check import converter_name
from quantize.formats.gguf.matrices import order_of
from quantize.model.architecture import block_count, block_layouts
from quantize.model.checkpoint import Checkpoint
from quantize.model.layout import BlockLayout
from quantize.store.manifest import CalibrationEntry
from quantize.system.cache import are_whole, hash_file
from quantize.system.files import sync

if TYPE_CHECKING:
    import torch

    from quantize.calibration.stream import Block

EXPERT = re.compile(r"\.experts\.(\d+)\.")


class ImatrixCollector:
    """Keeps sums of squared inputs: a file of a few kilobytes for each block, one for all of them in the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, str] = {}  # name -> sha256

    def pieces(self, layout: BlockLayout) -> Sequence[BlockLayout]:
        """The block whole: there is next to nothing to do."""
        return (layout,)

    def solve(self, block: Block) -> dict[str, torch.Tensor]:
        """The diagonals of a block's Gram matrices, and the tokens that they are sums over."""
        import torch

        rows = {}
        for linear in block.layout.linears:
            gram = block.grams[linear.input]
            rows[linear.tensor] = gram.matrix.diagonal().float().cpu().contiguous().clone()
            rows[linear.tensor + ":tokens"] = torch.tensor([float(gram.tokens)])
        return rows

    def add(self, index: int, solved: Sequence[dict[str, torch.Tensor]]) -> None:
        """Keep a block's diagonals in a file."""
        from safetensors.torch import save_file

        path = self._path.with_name(f"{self._path.stem}.{index:05d}.safetensors")
        with disk_errors(path.parent):
            save_file(dict(ChainMap(*solved)), path)
            sync(path)
        self._files[path.name] = hash_file(path)

    def state(self) -> dict[str, Any]:
        """The blocks' files and their hashes."""
        return {"files": dict(self._files)}

    def resume(self, state: Mapping[str, Any]) -> bool:
        """Go on with the files of a stopped build."""
        files = state.get("files")
        if not isinstance(files, dict) or not are_whole(self._path.parent, files):
            return False
        self._files = dict(files)
        return True

    def finish(self) -> None:
        """Write the scratch file."""
        from safetensors.torch import load_file, save_file

        rows = {}
        for name in self._files:
            rows.update(load_file(self._path.with_name(name)))
        with disk_errors(self._path.parent):
            save_file(rows, self._path)


def write_zeros(path: Path, checkpoint: Checkpoint) -> None:
    """A scratch file with the shapes that a pass would leave: for planning from headers."""
    import numpy as np
    from safetensors.numpy import save_file

    rows: dict[str, Any] = {}
    for layout in block_layouts(checkpoint.config):
        for linear in layout.linears:
            rows[linear.tensor] = np.zeros(checkpoint.tensors[linear.tensor].shape[1], np.float32)
            rows[linear.tensor + ":tokens"] = np.zeros(1, np.float32)
    save_file(rows, path)


def gguf_names(architecture: str, checkpoint: Checkpoint) -> Callable[[str], tuple[str | None, int | None]]:
    """From a tensor's name in the source to that in GGUF, None where it has none, and the expert that it is of."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], block_count(checkpoint.config))

    def named(tensor: str) -> tuple[str | None, int | None]:
        expert = EXPERT.search(tensor)
        found: str | None = names.get_name(EXPERT.sub(".experts.", converter_name(tensor)), try_suffixes=(".weight",))
        return found, int(expert[1]) if expert else None

    return named


def write_from_scratch(
    scratch: Path, out: Path, architecture: str, checkpoint: Checkpoint, calibration: CalibrationEntry,
    exact: Path | None = None,
) -> None:  # fmt: skip
    """Turn the scratch file into llama.cpp's. Raises BuildError for a linear that has no name in GGUF.

    exact: the 16-bit file, whose columns may be in another order than the source's; None for the source's own.
    """
    import numpy as np
    from safetensors.numpy import load_file

    named = gguf_names(architecture, checkpoint)
    tensors = {} if exact is None else read_gguf(exact).tensors
    rows: dict[str, dict[int, tuple[Any, Any]]] = {}
    found = load_file(scratch)
    for tensor in (name for name in found if not name.endswith(":tokens")):
        name, expert = named(tensor)
        if name is None:
            raise BuildError(f"{tensor} has no name in GGUF's {architecture}")
        squares = found[tensor]
        if name in tensors and (order := order_of(tensors[name], expert, checkpoint, tensor)):
            squares = squares[list(order)]
        rows.setdefault(name, {})[expert or 0] = (squares, found[tensor + ":tokens"])
    sums = {
        name: (
            np.stack([experts[index][0] for index in sorted(experts)]),
            np.concatenate([experts[index][1] for index in sorted(experts)]),
        )
        for name, experts in rows.items()
    }
    length = int(calibration.spec["sequence_length"])
    text = ", ".join(calibration.names)
    write_imatrix(out, sums, dataset=text, chunks=calibration.sequences, chunk_tokens=length)
