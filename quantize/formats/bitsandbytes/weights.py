"""The matrices of a bitsandbytes artifact as float32, one at a time; the arithmetic is in numerics/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.files.safetensors import read_tensor
from quantize.formats.folder import not_packed
from quantize.formats.format import Options, Product, Reader
from quantize.model.checkpoint import Checkpoint, read_json, tensor_table

if TYPE_CHECKING:
    from torch import Tensor

OUTLIERS = 6.0  # transformers' own llm_int8_threshold, where config.json has none


@dataclass(frozen=True)
class BitsandbytesWeights:
    """See Weights."""

    folded: bool = False

    def reader(self, path: Path, checkpoint: Checkpoint) -> Reader:
        """See Weights."""
        return _reader(path)

    def left(self, path: Path, names: Sequence[str], options: Options) -> list[str]:
        """See Weights."""
        return not_packed(path, names, ("SCB", "weight.absmax"))


def int8_products(folder: Path) -> Callable[[str], Product] | None:
    """bitsandbytes' own product for the weight of an INT8 linear, by its name; None for NF4, whose inputs stay as they
    are. Raises CheckpointError.
    """
    settings = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(settings, dict) or not settings.get("load_in_8bit"):
        return None
    from quantize.numerics.int8 import Int8Rows, multiply

    table, threshold = tensor_table(folder), float(settings.get("llm_int8_threshold", OUTLIERS))

    def product(name: str) -> Product:
        scales = table[f"{name.removesuffix('weight')}SCB"]
        return partial(multiply, Int8Rows(read_tensor(table[name]), read_tensor(scales)), threshold)

    return product


def _reader(folder: Path) -> Reader:
    table = tensor_table(folder)

    def tensor(name: str) -> Tensor:
        return read_tensor(table[name])

    def read(name: str, source: Tensor) -> Tensor | None:
        scales = f"{name.removesuffix('weight')}SCB"
        if scales in table:
            from quantize.numerics.int8 import Int8Rows

            return Int8Rows(tensor(name), tensor(scales)).dequantize()
        if f"{name}.absmax" in table:
            from quantize.numerics.nf4 import Nf4Blocks

            blocks = Nf4Blocks(tensor(name), tensor(f"{name}.absmax"), tensor(f"{name}.quant_map"))
            return blocks.dequantize(source.shape)
        return None

    return read
