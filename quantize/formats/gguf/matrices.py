"""A linear's weight in a GGUF file: a whole tensor, or an expert's part of one; its bytes, its values, its columns.

In: a tensor of the file, and which expert. Out: bytes, a matrix, or the order of its columns by the source's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantize.errors import BuildError, disk_errors
from quantize.files.gguf import GgufTensor
from quantize.files.safetensors import TensorInfo
from quantize.formats.gguf.columns import column_order
from quantize.model.checkpoint import Checkpoint
from quantize.system.untrusted import open_regular

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

ROWS_SEEN = 8  # at either end of a matrix: where they are the source's, bit by bit, the columns are


def span(tensor: GgufTensor, expert: int | None) -> tuple[int, int]:
    """Offset and size in bytes of a linear's part of a tensor."""
    if expert is None:
        return tensor.offset, tensor.size_bytes
    size = tensor.size_bytes // tensor.shape[-1]
    return tensor.offset + expert * size, size


def read_bytes(tensor: GgufTensor, offset: int, size: int) -> Bytes:
    """Some bytes of a tensor, uint8 [size]. Raises BuildError: the file is shorter; DiskFullError."""
    import numpy as np

    with disk_errors(tensor.path.parent):
        found = np.fromfile(tensor.path, np.uint8, size, offset=offset)
    if len(found) != size:
        raise BuildError(f"{tensor.path.name} became shorter while it was read")
    return found


def read_matrix(tensor: GgufTensor, expert: int | None) -> torch.Tensor:
    """A linear's weight in a 16- or 32-bit file, [out, in] in its own type. Raises BuildError."""
    import torch

    types = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    if tensor.type not in types:
        raise BuildError(f"{tensor.name} is {tensor.type} in the 16-bit file", hint="this is a fault of the converter")
    data = torch.from_numpy(read_bytes(tensor, *span(tensor, expert)))
    return data.view(types[tensor.type]).reshape(-1, tensor.shape[0])


def order_of(tensor: GgufTensor, expert: int | None, checkpoint: Checkpoint, name: str) -> tuple[int, ...] | None:
    """For each column of a linear's weight in a file that column of the source's matrix that it is; as column_order.

    name: of the matrix in the source. Only matrices that the converter has changed are read whole.
    """
    if _begins_and_ends_alike(tensor, expert, checkpoint.tensors[name]):
        return ()
    return column_order(read_matrix(tensor, expert), checkpoint.read(name))


def _begins_and_ends_alike(tensor: GgufTensor, expert: int | None, source: TensorInfo) -> bool:
    """Whether the first and last rows have the same bytes in both."""
    offset, size = span(tensor, expert)
    if (tensor.type, tensor.shape[0], size) != (source.dtype, source.shape[-1], source.size_bytes):
        return False
    length = min(size, ROWS_SEEN * (size // source.shape[0]))
    with disk_errors(source.path.parent), open_regular(source.path) as file:
        for place in (0, size - length):
            file.seek(source.offset + place)
            if file.read(length) != read_bytes(tensor, offset + place, length).tobytes():
                return False
    return True
