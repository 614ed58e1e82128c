"""The matrices of a GGUF file as float32, one at a time, read and dequantized by the gguf package.

In: a file, its source checkpoint. Out: tensors by the source's names, rows and columns in the source's order, where
llama.cpp's converter has another one: rotary halves, queries, keys and values in one matrix, heads of linear attention.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.files.gguf import UNQUANTIZED
from quantize.files.gguf_split import read_model, shard_paths
from quantize.formats.format import Options, Reader
from quantize.model.checkpoint import Checkpoint
from quantize.model.shape import ModelShape

if TYPE_CHECKING:
    from torch import Tensor

NEAR = 0.5  # cosine of a row and the source's; Q2_K has 0.9 and more
DEAD = 0.01  # of the mean row's energy: such a row has no direction
SKETCH = 256  # random projections of a row, by which those that are near are found
ROWS_AT_ONCE = 4096
ROTARY = ("q_proj.weight", "k_proj.weight")
_MATRIX = re.compile(r"^blk\.\d+\.(attn|ffn)_.*\.weight$")
_ROUTER = re.compile(r"ffn_gate_inp|_norm\.")


@dataclass(frozen=True)
class GgufWeights:
    """See Weights."""

    folded: bool = False

    def reader(self, path: Path, checkpoint: Checkpoint) -> Reader:
        """See Weights."""
        return _gguf_reader(path, checkpoint)

    def left(self, path: Path, names: Sequence[str], options: Options) -> list[str]:
        """See Weights; by the file's own names."""
        overrides = list(options.get("overrides") or {})
        return [
            f"{item.name} ({item.type})"
            for item in read_model(path).tensors.values()
            if item.type in UNQUANTIZED
            and _MATRIX.match(item.name)
            and not _ROUTER.search(item.name)
            and len(item.shape) > 1
            and not any(re.search(pattern, item.name) for pattern in overrides)
        ]


def _gguf_reader(path: Path, checkpoint: Checkpoint) -> Reader:
    import gguf
    import torch

    from quantize.formats.gguf.check import converter_name, name_map

    readers = [gguf.GGUFReader(part) for part in shard_paths(path)]
    tensors = {item.name: item for reader in readers for item in reader.tensors}
    architecture = str(readers[0].fields["general.architecture"].contents())
    names = name_map(architecture, checkpoint)
    head_dim = ModelShape.from_config(checkpoint.config).head_dim

    def values(item: Any) -> Tensor:
        return torch.from_numpy(gguf.quants.dequantize(item.data, item.tensor_type).copy())

    def read(name: str, source: Tensor) -> Tensor | None:
        item = tensors.get(names.get_name(converter_name(name), try_suffixes=(".weight",)) or "")
        if item is None:  # the experts of a block are one tensor in GGUF, and one each in the source
            return None
        found = values(item)
        if found.shape != source.shape:
            return None
        return in_source_order(_undo_rotary_order(found, source, head_dim) if name.endswith(ROTARY) else found, source)

    return read


def in_source_order(found: Tensor, source: Tensor) -> Tensor:
    """A matrix, [out, in] float32, with its rows, or its columns, where the nearest of the source's are.

    Only those that are not near the source's in their place are moved, and only among each other, each to a place of
    its own. Where that can't be, they are not the source's in another order, and the matrix is left as it is.
    """
    for axis in (0, 1) if found.dim() == 2 else ():
        places = _places(found if axis == 0 else found.T, source if axis == 0 else source.T)
        if places is not None:
            return found.index_select(axis, places)
    return found


def _places(found: Tensor, source: Tensor) -> Tensor | None:
    """For each row of the source, the row of `found` that is nearest to it; None where they are no such order."""
    import torch

    energy = (source * source).sum(1)
    moved = torch.nonzero(~_near(found, source) & (energy > DEAD * energy.mean())).flatten()
    if len(moved) < 2:
        return None
    mixed = torch.randn(source.shape[1], SKETCH, generator=torch.Generator().manual_seed(0))
    here, there = (torch.nn.functional.normalize(rows[moved] @ mixed, dim=1) for rows in (found, source))
    nearest = torch.cat([(part @ there.T).argmax(1) for part in torch.split(here, ROWS_AT_ONCE)])
    if len(torch.unique(nearest)) < len(nearest):
        return None
    places = torch.arange(len(source))
    places[moved[nearest]] = moved
    return places if bool(_near(found[places[moved]], source[moved]).all()) else None


def _near(found: Tensor, source: Tensor) -> Tensor:
    """Whether each row points where the source's does."""
    near: Tensor = (found * source).sum(1) >= NEAR * source.norm(dim=1) * found.norm(dim=1)
    return near


def _undo_rotary_order(found: Tensor, source: Tensor, head_dim: int) -> Tensor:
    """The rows of q and k in the source's order: llama.cpp's converter interleaves the two halves of each head.

    Some architectures are converted so and others not; the order that is nearer to the source is the one.
    """
    other = found.reshape(-1, head_dim // 2, 2, source.shape[1]).swapaxes(1, 2).reshape(source.shape)
    return other if float((other * source).sum()) > float((found * source).sum()) else found
