"""Safetensors shards written one tensor at a time, in an order that is fixed before the first byte.

In: the table of all tensors (from headers), then their data in that order. Out: shards with their headers, and the
index that Hugging Face readers expect. No second copy of anything is held: a tensor is written and forgotten.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from quantize.errors import BuildError, disk_errors
from quantize.files.safetensors import DTYPE_BITS, INDEX_NAME, header_bytes
from quantize.system.files import write_all

if TYPE_CHECKING:
    import torch

Table = Mapping[str, tuple[str, tuple[int, ...]]]
SHARD_BYTES = 5_000_000_000
CHUNK_BYTES = 8 << 20


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
    """Writes the tensors of a table, in its order; a context manager. Goes on from what `state` of another one said."""

    def __init__(self, folder: Path, table: Table, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._table = folder, table
        self._shards = plan_shards(table, shard_bytes)
        self._order = [(file, name) for file, part in self._shards.items() for name in part]
        self._next = 0
        self._file: FileIO | None = None
        self._open = ""
        self._digest = hashlib.sha256()
        self._pieces: list[list[Any]] = []  # [file, end, sha256 of what was written to it since the piece before]
        self.unsaved_bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    @property
    def written(self) -> int:
        """Tensors that are written."""
        return self._next

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor. Raises BuildError if it is not the next of the table, or not as the table says."""
        file, expected = self._order[self._next] if self._next < len(self._order) else ("", "nothing")
        if name != expected:
            raise BuildError(f"tensor {name} was written where {expected} was planned")
        dtype, shape = self._table[name]
        found = (_DTYPES[str(tensor.dtype)], tuple(tensor.shape))
        if found != (dtype, shape):
            raise BuildError(f"tensor {name} is {found}, planned was {(dtype, shape)}")
        import torch

        with disk_errors(self._folder):
            if file != self._open:
                self._start(file)
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self._put(raw.numpy().data)
        self._next += 1

    def state(self) -> dict[str, Any]:
        """What `resume` goes on from, as JSON data; all that is written is on disk then."""
        with disk_errors(self._folder):
            self._end_piece()
        return {"tensors": self._next, "pieces": [list(piece) for piece in self._pieces]}

    def resume(self, state: Mapping[str, Any]) -> bool:
        """Go on where a writer of the same table was when it gave `state`; what came after it is cut off.

        False, and nothing changed, if the files are not what they were then.
        """
        tensors, pieces = state.get("tensors"), state.get("pieces")
        if not isinstance(tensors, int) or not 0 <= tensors <= len(self._order) or not isinstance(pieces, list):
            return False
        ends = _intact(self._folder, pieces)
        if ends is None or [*ends.items()] != _ends(self._shards, self._table, tensors):
            return False
        with disk_errors(self._folder):
            for file in self._shards:
                if file not in ends:
                    (self._folder / file).unlink(missing_ok=True)
            for file, end in ends.items():
                os.truncate(self._folder / file, end)
            self._next, self._pieces = tensors, [list(piece) for piece in pieces]
            if ends:
                self._open = [*ends][-1]
                self._file = (self._folder / self._open).open("ab", buffering=0)
        return True

    def finish(self) -> tuple[str, ...]:
        """Close the last shard, write the index, and return the names of all files. Raises BuildError if some lack."""
        with disk_errors(self._folder):
            self._close()
            if self._next != len(self._order):
                raise BuildError(f"tensor {self._order[self._next][1]} was planned and never written")
            names = [*self._shards]
            if len(names) > 1:
                (self._folder / INDEX_NAME).write_bytes(_index(self._shards, self._table))
                names.append(INDEX_NAME)
        return tuple(names)

    def _start(self, file: str) -> None:
        self._close()
        self._file = (self._folder / file).open("wb", buffering=0)
        self._open = file
        self._put(header_bytes(self._shards[file]))

    def _put(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        write_all(self._file, data)
        self._digest.update(data)
        self.unsaved_bytes += len(data)

    def _end_piece(self) -> None:
        if self._file is not None and self.unsaved_bytes:
            os.fsync(self._file.fileno())
            self._pieces.append([self._open, self._file.tell(), self._digest.hexdigest()])
            self._digest, self.unsaved_bytes = hashlib.sha256(), 0

    def _close(self) -> None:
        if self._file is not None:
            self._end_piece()
            self._file.close()
            self._file = None


def _ends(shards: Mapping[str, Table], table: Table, tensors: int) -> list[tuple[str, int]]:
    """Where each shard that was begun ends once so many tensors are written."""
    ends: dict[str, int] = {}
    names = ((file, part, name) for file, part in shards.items() for name in part)
    for file, part, name in itertools.islice(names, tensors):
        ends[file] = ends.get(file) or len(header_bytes(part))
        ends[file] += _size(*table[name])
    return [*ends.items()]


def _intact(folder: Path, pieces: list[Any]) -> dict[str, int] | None:
    """Where each file ends by its last piece, once every piece has been read and has its hash; None if one has not."""
    ends: dict[str, int] = {}
    try:
        for file, end, sha256 in pieces:
            start = ends.get(file, 0)
            with (folder / Path(file).name).open("rb") as data:
                data.seek(start)
                if _digest_of(data, end - start) != sha256:
                    return None
            ends[file] = end
    except (OSError, TypeError, ValueError):
        return None
    return ends


def _digest_of(data: BinaryIO, size: int) -> str:
    digest = hashlib.sha256()
    while size > 0:
        chunk = data.read(min(size, CHUNK_BYTES))
        if not chunk:
            raise ValueError("cut short")
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


_DTYPES = {
    "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float32": "F32", "torch.int32": "I32",
    "torch.int8": "I8", "torch.uint8": "U8", "torch.int64": "I64", "torch.float8_e4m3fn": "F8_E4M3",
    "torch.uint32": "U32",
}  # fmt: skip


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of one that a header names. Raises KeyError: torch has none that is written here."""
    import torch

    found: torch.dtype = getattr(torch, {code: own for own, code in _DTYPES.items()}[name].removeprefix("torch."))
    return found


def _index(shards: Mapping[str, Table], table: Table) -> bytes:
    weight_map = {name: file for file, part in shards.items() for name in part}
    data = {"metadata": {"total_size": table_bytes(table)}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(data, indent=2) + "\n").encode()


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPE_BITS[dtype] // 8
