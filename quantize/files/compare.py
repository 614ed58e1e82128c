"""Two weight files of one format -> which tensors differ, and by how much.

In: what the headers of two files say, whatever their container. Out: one TensorDifference for each tensor that is not
the same. Bytes are compared in chunks; only chunks that differ are decoded, so that memory stays small whatever the
tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.files.gguf import TENSOR_TYPES, read_gguf
from quantize.files.safetensors import DTYPE_BITS, read_header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float64]

CHUNK_BYTES = 4 << 20
SAFETENSORS_KINDS = {
    "BOOL": "<u1", "U8": "<u1", "I8": "<i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "I32": "<i4", "U32": "<u4",
    "F32": "<f4", "I64": "<i8", "U64": "<u8", "F64": "<f8",
}  # fmt: skip
BLOCK_BYTES = {name: size_bytes for name, _, size_bytes in TENSOR_TYPES.values()}


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that is not the same in both files.

    what: the difference in words, where there is more to it than values. values: how many it has. differing: how many
    of them differ; None where they can't be compared. max_difference: the largest absolute difference of two values,
    dequantized in GGUF, as they are stored elsewhere (for packed integers: of the words); inf where one is NaN.
    """

    tensor: str
    what: str = ""
    values: int | None = None
    differing: int | None = None
    max_difference: float | None = None

    def __str__(self) -> str:
        if self.differing is None:
            return f"{self.tensor}: {self.what}"
        most = "" if self.max_difference is None else f", at most by {self.max_difference:.3g}"
        return f"{self.tensor}: {self.differing:,} of {self.values:,} values differ{most}"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a file: its bytes from an offset on, in blocks, each of which is decoded as one.

    type: in the words of the container. decode: bytes of whole blocks to values, in float64; None: nobody here can.
    """

    type: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int
    block_bytes: int
    decode: Callable[[NDArray[np.uint8]], Values] | None


@dataclass(frozen=True)
class WeightFile:
    """A file of weights by its header. fields: what it says beside tensors."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    fields: Mapping[str, Any] = field(default_factory=dict)


def compare_weights(first: WeightFile, second: WeightFile) -> list[TensorDifference]:
    """Every tensor that is not the same, in the order of the first file; [] where only headers differ."""
    ours, theirs = first.tensors, second.tensors
    found = [TensorDifference(name, "is only in the first file") for name in ours if name not in theirs]
    for name in (name for name in ours if name in theirs):
        found += _compare(name, (first.path, ours[name]), (second.path, theirs[name]))
    return found + [TensorDifference(name, "is only in the second file") for name in theirs if name not in ours]


def compare_metadata(first: WeightFile, second: WeightFile) -> list[str]:
    """Keys of two files' fields whose values differ."""
    one, two, missing = first.fields, second.fields, object()
    return [key for key in sorted({*one, *two}) if one.get(key, missing) != two.get(key, missing)]


def _compare(name: str, one: tuple[Path, StoredTensor], two: tuple[Path, StoredTensor]) -> list[TensorDifference]:
    (first, ours), (second, theirs) = one, two
    if (ours.type, ours.shape) != (theirs.type, theirs.shape):
        what = f"is {ours.type} {list(ours.shape)} in the first file, {theirs.type} {list(theirs.shape)} in the second"
        return [TensorDifference(name, what)]
    differing, largest, bytes_differ = 0, 0.0, False
    for left, right in zip(_chunks(first, ours), _chunks(second, theirs), strict=True):
        if (left == right).all():
            continue
        bytes_differ = True
        values = _decoded(ours, left), _decoded(ours, right)
        if values[0] is None or values[1] is None:
            return [TensorDifference(name, f"its bytes differ; {ours.type} can't be decoded here")]
        count, distance = _distance(values[0], values[1])
        differing, largest = differing + count, max(largest, distance)
    if differing:
        return [TensorDifference(name, "", math.prod(ours.shape), differing, largest)]
    return [TensorDifference(name, "other bytes for the same values")] if bytes_differ else []


def _distance(left: Values, right: Values) -> tuple[int, float]:
    """How many values differ and the largest difference; NaN is as far from a number as can be, and equals itself."""
    import numpy as np

    same = (left == right) | (np.isnan(left) & np.isnan(right))
    if same.all():
        return 0, 0.0
    with np.errstate(invalid="ignore"):
        distances = np.abs(left[~same] - right[~same])
    return int(distances.size), float(np.nan_to_num(distances, nan=np.inf, posinf=np.inf).max())


def _chunks(path: Path, tensor: StoredTensor) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a tensor, whole blocks at a time."""
    import numpy as np

    size = max(1, CHUNK_BYTES // tensor.block_bytes) * tensor.block_bytes
    with path.open("rb") as file:
        file.seek(tensor.offset)
        for start in range(0, tensor.size_bytes, size):
            yield np.frombuffer(file.read(min(size, tensor.size_bytes - start)), np.uint8)


def _decoded(tensor: StoredTensor, raw: NDArray[np.uint8]) -> Values | None:
    """The values of some blocks; None for a type that nobody here can decode."""
    if tensor.decode is None:
        return None
    try:
        return tensor.decode(raw)
    except NotImplementedError:
        return None


def safetensors_file(path: Path) -> WeightFile:
    """A safetensors file. Raises CheckpointError."""
    tensors = {
        name: StoredTensor(
            item.dtype, item.shape, item.offset, item.size_bytes, DTYPE_BITS[item.dtype] // 8, _stored(item.dtype)
        )
        for name, item in read_header(path).items()
    }
    return WeightFile(path, tensors)


def _stored(dtype: str) -> Callable[[NDArray[np.uint8]], Values] | None:
    import numpy as np

    def bfloat16(raw: NDArray[np.uint8]) -> Values:
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    if dtype == "BF16":
        return bfloat16
    kind = SAFETENSORS_KINDS.get(dtype)
    return None if kind is None else lambda raw: raw.view(kind).astype(np.float64)


def gguf_file(path: Path) -> WeightFile:
    """A GGUF file; of long lists (vocabularies) among its fields only that they are there. Raises CheckpointError."""
    file = read_gguf(path)
    tensors = {
        name: StoredTensor(
            item.type, item.shape, item.offset, item.size_bytes, BLOCK_BYTES[item.type], _dequantized(item.type)
        )
        for name, item in file.tensors.items()
    }
    return WeightFile(path, tensors, file.fields)


def _dequantized(type_name: str) -> Callable[[NDArray[np.uint8]], Values] | None:
    """By the gguf package's own tables; None without it, and for types that it does not know."""
    try:
        import gguf
        import numpy as np
    except ImportError:
        return None
    kind = getattr(gguf.GGMLQuantizationType, type_name, None)
    block_bytes = BLOCK_BYTES[type_name]

    def decode(raw: NDArray[np.uint8]) -> Values:
        values: Any = gguf.dequantize(raw.reshape(-1, block_bytes), kind)
        return np.asarray(values, np.float64).reshape(-1)

    return None if kind is None else decode
