"""Safetensors shards written one tensor at a time, in an order that is fixed before the first byte.

In: the table of all tensors (from headers), then their data in that order. Out: shards with their headers, and the
index that Hugging Face readers expect. No second copy of anything is held: a tensor is written and forgotten.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from quantize.checkpoint import INDEX_NAME
from quantize.containers.safetensors import DTYPE_BITS, header_bytes
from quantize.errors import BuildError

if TYPE_CHECKING:
    import torch

Table = Mapping[str, tuple[str, tuple[int, ...]]]
SHARD_BYTES = 5_000_000_000


def table_bytes(table: Table) -> int:
    """Bytes of all tensors of a table."""
    return sum(_size(dtype, shape) for dtype, shape in table.values())


def files_bytes(table: Table, shard_bytes: int = SHARD_BYTES) -> int:
    """Bytes that the shards of a table take on disk, headers and index included."""
    shards = plan_shards(table, shard_bytes)
    total = sum(len(header_bytes(part)) + table_bytes(part) for part in shards.values())
    return total + (len(_index(shards, table)) if len(shards) > 1 else 0)


def plan_shards(table: Table, shard_bytes: int = SHARD_BYTES) -> dict[str, Table]:
    """Cut a table into shards of at most `shard_bytes` (a larger tensor gets one of its own); file name -> its part."""
    parts: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    used = 0
    for name, (dtype, shape) in table.items():
        size = _size(dtype, shape)
        if parts[-1] and used + size > shard_bytes:
            parts.append({})
            used = 0
        parts[-1][name] = (dtype, shape)
        used += size
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, 1)}


class ShardWriter:
    """Writes the tensors of a table, in its order; a context manager."""

    def __init__(self, folder: Path, table: Table, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._table = folder, table
        self._shards = plan_shards(table, shard_bytes)
        self._order = [(file, name) for file, part in self._shards.items() for name in part]
        self._next = 0
        self._file: BinaryIO | None = None
        self._open = ""

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor. Raises BuildError if it is not the next of the table, or not as the table says."""
        file, expected = self._order[self._next] if self._next < len(self._order) else ("", "nothing")
        if name != expected:
            raise BuildError(f"tensor {name} was written where {expected} was planned")
        dtype, shape = self._table[name]
        found = (_DTYPES[str(tensor.dtype)], tuple(tensor.shape))
        if found != (dtype, shape):
            raise BuildError(f"tensor {name} is {found}, planned was {(dtype, shape)}")
        if file != self._open:
            self._close()
            self._file = (self._folder / file).open("wb")
            self._file.write(header_bytes(self._shards[file]))
            self._open = file
        assert self._file is not None
        import torch

        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(raw.numpy().data)
        self._next += 1

    def finish(self) -> tuple[str, ...]:
        """Close the last shard, write the index, and return the names of all files. Raises BuildError if some lack."""
        self._close()
        if self._next != len(self._order):
            raise BuildError(f"tensor {self._order[self._next][1]} was planned and never written")
        names = [*self._shards]
        if len(names) > 1:
            (self._folder / INDEX_NAME).write_bytes(_index(self._shards, self._table))
            names.append(INDEX_NAME)
        return tuple(names)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


_DTYPES = {
    "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float32": "F32", "torch.int32": "I32",
    "torch.int8": "I8", "torch.uint8": "U8", "torch.int64": "I64",
}  # fmt: skip


def _index(shards: Mapping[str, Table], table: Table) -> bytes:
    weight_map = {name: file for file, part in shards.items() for name in part}
    data = {"metadata": {"total_size": table_bytes(table)}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(data, indent=2) + "\n").encode()


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPE_BITS[dtype] // 8
