"""llama.cpp's importance matrix file: mean squared input of each channel, a tensor pair for each linear.

In: sums of squares and counts. Out: a GGUF file as `llama-imatrix` writes it (general.type "imatrix"), and back.
The format: llama.cpp, tools/imatrix: `<tensor>.in_sum2` (sums) and `<tensor>.counts` (tokens; one per expert).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def write_imatrix(
    path: Path, sums: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]], *, chunk_tokens: int, chunks: int,
    dataset: str,
) -> None:  # fmt: skip
    """Write sums of squares [experts, inputs] and counts [experts], float32 both, by GGUF tensor name.

    dataset: a name of the text, never a path.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "imatrix")
    writer.kv_data[0].pop("general.architecture", None)  # llama.cpp's file has a general.type only
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_tokens)
    for name in sorted(sums):
        squares, counts = sums[name]
        writer.add_tensor(f"{name}.in_sum2", squares)
        writer.add_tensor(f"{name}.counts", counts.reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_imatrix(path: Path) -> dict[str, Sequence[float]]:
    """Mean squared inputs by tensor name, experts one after another: what llama_model_quantize takes.

    An expert that saw no token gets ones: all its channels weigh the same.
    """
    import gguf
    import numpy as np

    tensors = {item.name: item.data for item in gguf.GGUFReader(path).tensors}
    result: dict[str, Sequence[float]] = {}
    for name, squares in tensors.items():
        if not name.endswith(".in_sum2"):
            continue
        counts = np.asarray(tensors[name.removesuffix(".in_sum2") + ".counts"]).reshape(-1, 1)
        rows = np.asarray(squares, dtype=np.float32).reshape(len(counts), -1)
        means = np.where(counts > 0, rows / np.maximum(counts, 1), 1.0).astype(np.float32)
        result[name.removesuffix(".in_sum2")] = means.reshape(-1).tolist()
    return result
