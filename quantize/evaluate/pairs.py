"""The matrices of an artifact as floating-point weights, beside those of its source, one at a time.

In: an artifact's folder and format, the source checkpoint. Out: pairs of float32 [out, in] tensors in one layout: the
order that GGUF gives rotary rows is undone. Scales that AWQ folds into
neighbours are still in; who compares takes them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.formats.gguf.check import name_map
from quantize.formats.unpack import open_packed
from quantize.model.architecture import block_layouts
from quantize.model.checkpoint import Checkpoint, tensor_table
from quantize.model.shape import ModelShape

if TYPE_CHECKING:
    from torch import Tensor

ROTARY = ("q_proj.weight", "k_proj.weight")
Reader = Callable[[str, "Tensor"], "Tensor | None"]


@dataclass(frozen=True)
class Pair:
    """One matrix: what the artifact stands for, and what the source has, both float32 [out, in]."""

    tensor: str
    artifact: Tensor
    source: Tensor


def matrices(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the linears in the source's decoder blocks. Raises CheckpointError: not in the table."""
    return tuple(linear.tensor for layout in block_layouts(checkpoint.config) for linear in layout.linears)


def pairs(folder: Path, format: str, main_file: str | None, checkpoint: Checkpoint) -> Iterator[Pair]:
    """Every linear that both have. Raises CheckpointError, VerifyError: a tensor can't be read."""
    read = _gguf_reader(folder / str(main_file), checkpoint) if format == "gguf" else _folder_reader(folder, format)
    for name in matrices(checkpoint):
        source = checkpoint.read(name).float()
        artifact = read(name, source)
        if artifact is not None:
            yield Pair(name, artifact, source)


def _folder_reader(folder: Path, format: str) -> Reader:
    if format in ("awq", "gptq"):
        packed = open_packed(folder, format)
        known = frozenset(packed.linears)

        def read_packed(name: str, source: Tensor) -> Tensor | None:
            linear = name.removesuffix(".weight")
            return packed.dequantize(linear) if linear in known else None

        return read_packed
    return _bitsandbytes_reader(folder)


def _bitsandbytes_reader(folder: Path) -> Reader:
    from safetensors import safe_open

    places = {name: info.path for name, info in tensor_table(folder).items()}

    def tensor(name: str) -> Tensor:
        with safe_open(places[name], framework="pt") as file:
            found: Tensor = file.get_tensor(name)
            return found

    def read(name: str, source: Tensor) -> Tensor | None:
        scales = f"{name.removesuffix('weight')}SCB"
        if scales in places:
            from quantize.numerics.int8 import Int8Rows

            return Int8Rows(tensor(name), tensor(scales)).dequantize()
        if f"{name}.absmax" in places:
            from quantize.numerics.nf4 import Nf4Blocks

            blocks = Nf4Blocks(tensor(name), tensor(f"{name}.absmax"), tensor(f"{name}.quant_map"))
            return blocks.dequantize(source.shape)
        return None

    return read


def _gguf_reader(path: Path, checkpoint: Checkpoint) -> Reader:
    import gguf
    import torch

    reader = gguf.GGUFReader(path)
    tensors = {item.name: item for item in reader.tensors}
    architecture = str(reader.fields["general.architecture"].contents())
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
