"""llama.cpp's own rounding of a matrix, by the function that llama_model_quantize calls for each of its tensors."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

Array = np.ndarray[Any, Any]


@cache
def _function() -> Any:
    (path,) = (path for path in Path(llama_cpp.__file__).parent.rglob("libggml-base*.so"))
    found = ctypes.CDLL(str(path)).ggml_quantize_chunk
    found.restype = ctypes.c_size_t
    found.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return found


def rounded(kind: str, weight: Array, importance: Array | None = None) -> Array:
    """A float32 matrix [out, in] in a type's bytes, uint8 [out, bytes of a row]; importance: float32 [in]."""
    number = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[number]
    weight = np.ascontiguousarray(weight, np.float32)
    out = np.zeros((len(weight), weight.shape[1] // block * block_bytes), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    done = _function()(
        number.value, weight.ctypes.data, out.ctypes.data, 0, *weight.shape,
        None if weights is None else weights.ctypes.data,
    )  # fmt: skip
    assert done == out.nbytes
    return out


def values(kind: str, data: Array) -> Array:
    """What bytes stand for, by the gguf package: float32 [out, in]."""
    return np.asarray(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]), np.float32)
