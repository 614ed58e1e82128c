"""The matrices of a GGUF file as float32, one at a time, read and dequantized by the gguf package.

In: a file, its source checkpoint. Out: tensors by the source's names; the order that GGUF gives rotary rows is undone.
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

    from quantize.formats.gguf.check import name_map

    readers = [gguf.GGUFReader(part) for part in shard_paths(path)]
    tensors = {item.name: item for reader in readers for item in reader.tensors}
    architecture = str(readers[0].fields["general.architecture"].contents())
    names = name_map(architecture, checkpoint)
    head_dim = ModelShape.from_config(checkpoint.config).head_dim

    def values(item: Any) -> Tensor:
        return torch.from_numpy(gguf.quants.dequantize(item.data, item.tensor_type).copy())

    def read(name: str, source: Tensor) -> Tensor | None:
        item = tensors.get(names.get_name(name, try_suffixes=(".weight",)) or "")
        if item is None:  # the experts of a block are one tensor in GGUF, and one each in the source
            return None
        found = values(item)
        if found.shape != source.shape:
            return None
        return _undo_rotary_order(found, source, head_dim) if name.endswith(ROTARY) else found

    return read


def _undo_rotary_order(found: Tensor, source: Tensor, head_dim: int) -> Tensor:
    """The rows of q and k in the source's order: llama.cpp's converter interleaves the two halves of each head.

    Some architectures are converted so and others not; the order that is nearer to the source is the one.
    """
    other = found.reshape(-1, head_dim // 2, 2, source.shape[1]).swapaxes(1, 2).reshape(source.shape)
    return other if float((other * source).sum()) > float((found * source).sum()) else found
