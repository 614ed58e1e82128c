"""A Mending -> the checkpoint that it describes, in a folder of its own, written tensor by tensor.

In: a Mending. Out: config, tokenizer and safetensors; with sparse weights for a plan. Weights that need no change are
linked, not copied, where the file system lets them. Runs in a worker, but for the skeleton, which needs no torch.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import CheckpointError, disk_errors
from quantize.events import Reporter, progress
from quantize.files.safetensors import INDEX_NAME, TensorInfo, read_tensor, write_sparse
from quantize.files.shards import ShardWriter, torch_dtype
from quantize.model.adapter import Merged, Table, Tensors
from quantize.model.checkpoint import WHOLE, is_computed, read_json, read_model
from quantize.model.mending import OLD_TEMPLATE, TEMPLATE, Mending, renamed
from quantize.model.quantized import Dequantized, dequantized_table

if TYPE_CHECKING:
    from torch import Tensor


class Stored:
    """The tensors of files, dequantized where they must be, under their names once mended."""

    def __init__(self, mending: Mending) -> None:
        config, found = read_model(mending.folder)
        self._files = {name: info for name, info in found.items() if not is_computed(info)}
        plain = dequantized_table(self._files, config) if mending.method else _as_stored(self._files)
        self._items = {renamed(name, mending.renames): item for name, item in plain.items()}
        if len(self._items) != len(plain):
            raise CheckpointError("two tensors have one name once it is mended", hint="save the model again")
        self.table: Table = {name: (item.dtype, item.shape) for name, item in self._items.items()}

    def read(self, name: str) -> Tensor:
        """One tensor as its table says."""
        item = self._items[name]
        if item.read is None:
            return self._get(item.stored)
        tensor = item.read(self._get)
        if tuple(tensor.shape) != item.shape:
            raise CheckpointError(f"tensor {name!r} is {list(tensor.shape)} once dequantized, not {list(item.shape)}")
        return tensor.to(torch_dtype(item.dtype))

    def _get(self, name: str) -> Tensor:
        return read_tensor(self._files[name])


def open_tensors(mending: Mending) -> Tensors:
    """The tensors of a mended model; reads headers. Raises CheckpointError: they are not what the mending needs."""
    stored = Stored(mending)
    return stored if mending.adapter is None else Merged(stored, mending.adapter)


def write_mended(reporter: Reporter, mending: Mending, out: Path) -> None:
    """Write the whole checkpoint into a folder. Raises CheckpointError, DiskFullError."""
    with disk_errors(out):
        _write_beside(mending, out)
        if not mending.changes_weights:
            for path in _weight_files(mending.folder):
                _link(path, out / path.relative_to(mending.folder))
            return
    tensors = open_tensors(mending)
    with ShardWriter(out, tensors.table) as writer:
        for done, name in enumerate(tensors.table, 1):
            writer.write(name, tensors.read(name))
            progress(reporter, "", "mending the source, tensors", done, len(tensors.table))
        writer.finish()


def write_skeleton(mending: Mending, out: Path) -> None:
    """Write what write_mended would, but with a sparse file of zeros for the weights. Raises as write_mended does."""
    with disk_errors(out):
        _write_beside(mending, out)
        table = open_tensors(mending).table
        write_sparse(out / WHOLE, dict(table))


def _as_stored(tensors: dict[str, TensorInfo]) -> dict[str, Dequantized]:
    return {name: Dequantized(info.dtype, info.shape, name) for name, info in tensors.items()}


def _write_beside(mending: Mending, out: Path) -> None:
    for name, path in mending.beside().items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / name)
    if mending.method is not None or mending.claimed is not None:
        config = {key: value for key, value in read_json(out / "config.json").items() if key != "quantization_config"}
        _write_json(out / "config.json", config)
    if mending.template:
        template = read_json(out / OLD_TEMPLATE)["chat_template"]
        (out / TEMPLATE).write_text(template, encoding="utf-8")
        (out / OLD_TEMPLATE).unlink()


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _weight_files(folder: Path) -> list[Path]:
    _, tensors = read_model(folder)
    files = sorted({info.path for info in tensors.values()})
    index = folder / INDEX_NAME
    return [*files, index] if folder / WHOLE not in files and os.path.isfile(index) else files


def _link(source: Path, target: Path) -> None:
    """A second name of a file, or a copy where the file system gives none."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
