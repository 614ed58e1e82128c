"""Safetensors headers and shards: what is in a file, without reading its weights; and one tensor of it.

In: paths. Out: tensor tables (name, dtype, shape, place), or CheckpointError for a file that can't be trusted.
The format: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from quantize.errors import CheckpointError, first_line
from quantize.system.untrusted import open_regular, parse_json

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_TENSORS = 1_000_000
MAX_ELEMENTS = 1 << 60
MAX_OFFSET = 1 << 63

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a safetensors file: `offset` counts from the start of the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    size_bytes: int

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises CheckpointError: can't be read, truncated, header not JSON, sizes that overflow or disagree with the shape,
    tensors that overlap, leave a gap or pass the end of the file.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            raw = _header(path, file, size)
    except OSError as exc:
        raise _damaged(path, f"can't be read: {exc.strerror or exc}", "check the file and its permissions") from exc
    length = len(raw)
    try:
        header = parse_json(raw)
    except ValueError as exc:
        raise _damaged(path, f"its header is not JSON ({first_line(exc, 100)})", "download it again") from exc
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object", "download it again")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its `__metadata__` is not an object of texts", "download it again")
    if len(header) > MAX_TENSORS:
        raise _damaged(path, f"{len(header):,} tensors are too many", f"at most {MAX_TENSORS:,} are read")
    tensors = [_tensor(path, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda item: (item.offset, item.size_bytes))
    _check_layout(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


def read_tensor(info: TensorInfo) -> Tensor:
    """One tensor in its own dtype and shape. Needs torch. Raises CheckpointError: it can't be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(info.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(info.name)
            return tensor
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"{info.path.name}: tensor {info.name!r} can't be read: {exc}") from exc


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The first bytes of a safetensors file that holds `tensors` (name -> dtype, shape) in the given order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def write_sparse(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Write a safetensors file with this header and a hole for the weights. Raises OSError."""
    header = header_bytes(tensors)
    size = sum(math.prod(shape) * DTYPE_BITS[dtype] // 8 for dtype, shape in tensors.values())
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)


def _header(path: Path, file: BinaryIO, size: int) -> bytes:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise _damaged(path, f"only {len(prefix)} bytes long", "download it again")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES or length > size - 8:
        raise _damaged(path, f"its header claims {length:,} bytes; the file has {size:,}", "download it again")
    raw = file.read(length)
    if len(raw) < length:
        raise _damaged(path, "it became shorter while it was read", "wait until it is complete")
    return raw


def _tensor(path: Path, name: str, entry: object, start: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore[index]
        numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    except (TypeError, KeyError, ValueError) as exc:
        raise _damaged(path, f"tensor {name[:80]!r} has no dtype, shape or offsets", "download it again") from exc
    if any(type(number) is not int or not 0 <= number < MAX_OFFSET for number in numbers) or begin > end:
        raise _damaged(path, f"tensor {name[:80]!r} has an impossible shape or offset", "download it again")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _damaged(path, f"tensor {name[:80]!r} has dtype {dtype!r}", f"known: {', '.join(DTYPE_BITS)}")
    elements = 1
    for number in shape:
        elements *= number
        if elements > MAX_ELEMENTS:
            raise _damaged(path, f"tensor {name[:80]!r} has a shape that overflows", "download it again")
    if end - begin != elements * DTYPE_BITS[dtype] // 8:
        message = f"tensor {name[:80]!r} is {shape} {dtype} but has {end - begin:,} bytes"
        raise _damaged(path, message, "download it again")
    return TensorInfo(name, dtype, tuple(shape), path, start + begin, end - begin)


def _check_layout(path: Path, tensors: list[TensorInfo], start: int, size: int) -> None:
    position = start
    for tensor in tensors:
        if tensor.offset < position:
            raise _damaged(path, f"tensor {tensor.name[:80]!r} overlaps the one before it", "download it again")
        if tensor.offset > position:
            raise _damaged(path, f"there is a gap before tensor {tensor.name[:80]!r}", "download it again")
        position = tensor.offset + tensor.size_bytes
    if position > size:
        raise _damaged(path, f"truncated: {position - size:,} bytes are missing at the end", "download it again")
    if position < size:
        raise _damaged(path, f"{size - position:,} bytes follow the last tensor", "download it again")


def _damaged(path: Path, what: str, hint: str) -> CheckpointError:
    return CheckpointError(f"{path.name}: {what}", hint=hint)
