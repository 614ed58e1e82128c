"""FP8 in a worker: one tensor after another, without a calibration pass."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from quantize.events import Reporter
from quantize.files.shards import torch_dtype
from quantize.formats.base import Context
from quantize.formats.compressed_tensors.schemes import FP8_BLOCK_SIZE
from quantize.formats.folder_build import TensorLayout
from quantize.formats.one_by_one import write_one_by_one
from quantize.system.processor import device_name

if TYPE_CHECKING:
    from torch import Tensor

SCALE = "weight_scale"


def write_rounded(reporter: Reporter, context: Context, layout: TensorLayout) -> tuple[tuple[str, ...], str]:
    """Write every tensor of the layout; the names of the files, and the kind of processor that rounded."""
    tensors_of = partial(_tensors, context, layout)
    text = f"rounding to {context.options.scheme}"
    files = write_one_by_one(
        reporter, context.staging, context.scratch, layout.table, tensors_of, text, context.variant
    )
    return files, device_name("cpu")


def _tensors(context: Context, layout: TensorLayout, name: str) -> dict[str, Tensor]:
    """What one tensor of the source becomes, that `name` is a part of."""
    from quantize.numerics.floats import fp8_blocks, fp8_rows

    checkpoint = context.checkpoint
    source = f"{name.removesuffix(SCALE)}weight" if name.endswith(f".{SCALE}") else name
    weight = checkpoint.read(source)
    if source not in layout.packed:
        return {source: weight.to(torch_dtype(layout.table[source][0]))}
    scales = f"{source.removesuffix('weight')}{SCALE}"
    stored = torch_dtype(layout.table[scales][0])
    is_blocks = context.options.kind.weights["strategy"] == "block"
    found = fp8_blocks(weight, FP8_BLOCK_SIZE, stored) if is_blocks else fp8_rows(weight, stored)
    return {source: found.codes, scales: found.scales}
