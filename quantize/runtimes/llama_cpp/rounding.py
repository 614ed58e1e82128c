"""A matrix rounded to a type of llama.cpp's by llama.cpp itself, in memory.

In: float32 rows, a type, how much each column matters. Out: the bytes that its quantizer writes for them.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from quantize.errors import BuildError, MissingExtraError
from quantize.files.gguf import EXTRA, TENSOR_TYPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]

NUMBERS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}


def row_bytes(kind: str, width: int) -> int:
    """Bytes of a row of so many values; width is a multiple of the type's block."""
    _, values, size = TENSOR_TYPES[NUMBERS[kind]]
    return width // values * size


def round_rows(kind: str, rows: Floats, importance: Floats | None) -> Bytes:
    """uint8 [rows, bytes of a row] of float32 rows [rows, in]. importance: [in], as in an importance matrix.

    May be called on several threads at once. Raises MissingExtraError, BuildError.
    """
    library = _library()
    count, width = rows.shape
    rows = np.ascontiguousarray(rows, np.float32)
    out = np.empty((count, row_bytes(kind, width)), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    floats = ctypes.POINTER(ctypes.c_float)
    written = library.ggml_quantize_chunk(
        NUMBERS[kind], rows.ctypes.data_as(floats), out.ctypes.data, 0, count, width,
        None if weights is None else weights.ctypes.data_as(floats),
    )  # fmt: skip
    if written != out.nbytes:
        raise BuildError(f"llama.cpp wrote {written:,} bytes of {kind}, not {out.nbytes:,}")
    return out


def _library() -> Any:
    """ggml's functions; libggml brings libggml-base's along."""
    try:
        from llama_cpp._ggml import libggml as library
    except ImportError as exc:
        raise MissingExtraError("the GGUF format", EXTRA) from exc
    number, floats = ctypes.c_int64, ctypes.POINTER(ctypes.c_float)
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, floats, ctypes.c_void_p, number, number, number, floats
    ]  # fmt: skip
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library
