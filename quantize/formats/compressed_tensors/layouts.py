"""The tensors that a linear becomes in each layout: their names, types and shapes, by arithmetic alone."""

from __future__ import annotations

from quantize.formats.compressed_tensors.options import CompressedTensorsOptions
from quantize.formats.compressed_tensors.schemes import FLOATS, FP8_BLOCK_SIZE, INTEGERS, MXFP4, NVFP4
from quantize.formats.folder_build import LinearTable, Shape

Entries = dict[str, tuple[str, Shape]]


def table_of(options: CompressedTensorsOptions, half: str) -> LinearTable:
    """See folder_build.LinearTable. half: the type of scales that are 16 bits."""
    scheme, shared = options.kind, options.shared or 0
    bits = scheme.bits

    def packed(out: int, width: int) -> Entries:
        found: Entries = {
            "weight_packed": ("I32", (out, -(-width * bits // 32))),
            "weight_scale": (half, (out, width // shared)),
            "weight_shape": ("I64", (2,)),
        }
        if not scheme.symmetric:
            found["weight_zero_point"] = ("I32", (-(-out * bits // 32), width // shared))
        return found

    def rows(out: int, width: int) -> Entries:
        return {"weight": ("I8" if scheme.layout == INTEGERS else "F8_E4M3", (out, width)),
                "weight_scale": (half, (out, 1))}  # fmt: skip

    def blocks(out: int, width: int) -> Entries:
        scales = -(-out // FP8_BLOCK_SIZE), -(-width // FP8_BLOCK_SIZE)
        return {"weight": ("F8_E4M3", (out, width)), "weight_scale": (half, scales)}

    def fours(out: int, width: int) -> Entries:
        found: Entries = {} if scheme.layout == MXFP4 else {"weight_global_scale": ("F32", (1,))}
        kind = "U8" if scheme.layout == MXFP4 else "F8_E4M3"
        return found | {"weight_packed": ("U8", (out, width // 2)), "weight_scale": (kind, (out, width // shared))}

    if scheme.layout in (NVFP4, MXFP4):
        return fours
    if scheme.layout == FLOATS and scheme.weights["strategy"] == "block":
        return blocks
    return rows if scheme.layout in (INTEGERS, FLOATS) else packed
