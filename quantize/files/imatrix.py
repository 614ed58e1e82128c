"""llama.cpp's importance matrix file: sums of squared inputs of each channel, a tensor pair for each linear.

In: sums of squares and token counts by GGUF tensor name. Out: a GGUF file as `llama-imatrix` writes it, and back; or
CheckpointError for a file that can't be trusted.
The format: llama.cpp, tools/imatrix: `<tensor>.in_sum2` (sums) and `<tensor>.counts` (tokens; one per expert).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.errors import CheckpointError
from quantize.files.gguf import GgufTensor, read_gguf
from quantize.system.untrusted import open_regular

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

SUMS, COUNTS = ".in_sum2", ".counts"


def write_imatrix(
    path: Path, sums: Mapping[str, tuple[Floats, Floats]], *, dataset: str, chunks: int, chunk_tokens: int
) -> None:
    """Write sums of squares [experts, inputs] and counts [experts], float32 both, by GGUF tensor name.

    dataset: a name of the text, never a path. chunks, chunk_tokens: the text's sequences and their longest length.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_tokens)
    for name in sorted(sums):
        squares, counts = sums[name]
        writer.add_tensor(name + SUMS, squares)
        writer.add_tensor(name + COUNTS, counts.reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_imatrix(path: Path) -> dict[str, Floats]:
    """Mean squared inputs by tensor name, float32, experts one after another: what llama_model_quantize takes.

    An expert that saw no token gets ones: all its channels weigh the same. Raises CheckpointError: it can't be read,
    sums without counts or of another number of experts, types but float32, values that are no sums of squares.
    """
    import numpy as np

    tensors = read_gguf(path).tensors
    result: dict[str, Floats] = {}
    for name, squares in tensors.items():
        if not name.endswith(SUMS):
            continue
        base = name.removesuffix(SUMS)
        counts = _values(path, tensors.get(base + COUNTS), base).reshape(-1, 1)
        sums = _values(path, squares, base)
        if not len(counts) or not len(sums) or len(sums) % len(counts):
            raise _damaged(path, base, f"has {len(sums):,} sums and {len(counts):,} counts")
        rows = sums.reshape(len(counts), -1)
        means = np.where(counts > 0, rows / np.maximum(counts, 1), 1.0).astype(np.float32)
        result[base] = np.ascontiguousarray(means.reshape(-1))
    return result


def _values(path: Path, tensor: GgufTensor | None, base: str) -> Floats:
    import numpy as np

    if tensor is None or tensor.type != "F32":
        raise _damaged(path, base, "has no counts" if tensor is None else f"is of type {tensor.type}, not F32")
    try:
        with open_regular(path) as file:
            file.seek(tensor.offset)
            raw = file.read(tensor.size_bytes)
    except OSError as exc:
        raise _damaged(path, base, f"can't be read: {exc.strerror}") from exc
    values = np.frombuffer(raw[: len(raw) // 4 * 4], "<f4")
    if len(raw) != tensor.size_bytes or not bool(np.isfinite(values).all() and (values >= 0).all()):
        raise _damaged(path, base, "has values that are no sums of squares, or is truncated")
    return values


def _damaged(path: Path, base: str, what: str) -> CheckpointError:
    return CheckpointError(f"{path.name}: {base[:80]!r} {what}", hint="make the importance matrix again")
