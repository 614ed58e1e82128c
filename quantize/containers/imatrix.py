"""llama.cpp's importance matrix file: sums of squared inputs of each channel, a tensor pair for each linear.

In: sums of squares and token counts by GGUF tensor name. Out: a GGUF file as `llama-imatrix` writes it, and back.
The format: llama.cpp, tools/imatrix: `<tensor>.in_sum2` (sums) and `<tensor>.counts` (tokens; one per expert).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

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

    An expert that saw no token gets ones: all its channels weigh the same.
    """
    import gguf
    import numpy as np

    tensors = {item.name: item.data for item in gguf.GGUFReader(path).tensors}
    result: dict[str, Floats] = {}
    for name, squares in tensors.items():
        if not name.endswith(SUMS):
            continue
        counts = np.asarray(tensors[name.removesuffix(SUMS) + COUNTS]).reshape(-1, 1)
        rows = np.asarray(squares, dtype=np.float32).reshape(len(counts), -1)
        means = np.where(counts > 0, rows / np.maximum(counts, 1), 1.0).astype(np.float32)
        result[name.removesuffix(SUMS)] = np.ascontiguousarray(means.reshape(-1))
    return result
