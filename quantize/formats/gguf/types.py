"""Tables of llama.cpp's types: file types that a recipe may name, and the bits a weight of each tensor type.

Bits follow from the block sizes of files/gguf; file types as in llama.h (enum llama_ftype).
A test holds both tables against the installed packages.
"""

from __future__ import annotations

from quantize.files.gguf import TENSOR_TYPES

_CHOICES = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_1", "Q5_0", "Q5_K", "Q4_1", "Q4_0", "Q4_K", "IQ4_NL", "NVFP4", "IQ4_XS",
    "MXFP4", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "TQ2_0", "IQ1_M", "TQ1_0", "IQ1_S",
    "Q1_0",
)  # fmt: skip
_BITS = {name: 8 * block_bytes / values for name, values, block_bytes in TENSOR_TYPES.values()}
# Tensor type that a recipe may name -> bits a weight, scales included.
ELEMENT_TYPES: dict[str, float] = {name: _BITS[name] for name in _CHOICES}

UNQUANTIZED_TYPES = ("F32", "F16", "BF16")

# File type -> (tensor type that most tensors get, nominal bits).
FTYPES: dict[str, tuple[str, int]] = {
    "F32": ("F32", 32), "F16": ("F16", 16), "BF16": ("BF16", 16), "Q8_0": ("Q8_0", 8), "Q6_K": ("Q6_K", 6),
    "Q5_K_M": ("Q5_K", 5), "Q5_K_S": ("Q5_K", 5), "Q5_1": ("Q5_1", 5), "Q5_0": ("Q5_0", 5),
    "Q4_K_M": ("Q4_K", 4), "Q4_K_S": ("Q4_K", 4), "Q4_1": ("Q4_1", 4), "Q4_0": ("Q4_0", 4),
    "IQ4_NL": ("IQ4_NL", 4), "IQ4_XS": ("IQ4_XS", 4), "MXFP4_MOE": ("MXFP4", 4), "NVFP4": ("NVFP4", 4),
    "Q3_K_L": ("Q3_K", 3), "Q3_K_M": ("Q3_K", 3), "Q3_K_S": ("Q3_K", 3),
    "IQ3_M": ("IQ3_S", 3), "IQ3_S": ("IQ3_S", 3), "IQ3_XS": ("IQ3_S", 3), "IQ3_XXS": ("IQ3_XXS", 3),
    "Q2_K": ("Q2_K", 2), "Q2_K_S": ("Q2_K", 2),
    "IQ2_M": ("IQ2_S", 2), "IQ2_S": ("IQ2_XS", 2), "IQ2_XS": ("IQ2_XS", 2), "IQ2_XXS": ("IQ2_XXS", 2),
    "TQ2_0": ("TQ2_0", 2), "IQ1_M": ("IQ1_M", 1), "IQ1_S": ("IQ1_S", 1), "TQ1_0": ("TQ1_0", 1), "Q1_0": ("Q1_0", 1),
}  # fmt: skip

BITS: dict[str, int] = {name: bits for name, (_, bits) in FTYPES.items()}


def base_type(file_type: str) -> str:
    """The tensor type that a file type gives to most tensors."""
    return FTYPES[file_type][0]
