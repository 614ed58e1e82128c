"""The matrices of a bitsandbytes artifact as float32, one at a time; the arithmetic is in numerics/."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.formats.folder import not_packed
from quantize.formats.format import Options, Reader
from quantize.model.checkpoint import Checkpoint, tensor_table

if TYPE_CHECKING:
    from torch import Tensor


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


def _reader(folder: Path) -> Reader:
    from safetensors import safe_open

    places = {name: info.path for name, info in tensor_table(folder).items()}

    def tensor(name: str) -> Tensor:
        with safe_open(places[name], framework="pt") as file:
            found: Tensor = file.get_tensor(name)
            return found

    def read(name: str, source: Tensor) -> Tensor | None:
        scales = f"{name.removesuffix('weight')}SCB"
        if scales in places:
            from quantize.numerics.int8 import Int8Rows

            return Int8Rows(tensor(name), tensor(scales)).dequantize()
        if f"{name}.absmax" in places:
            from quantize.numerics.nf4 import Nf4Blocks

            blocks = Nf4Blocks(tensor(name), tensor(f"{name}.absmax"), tensor(f"{name}.quant_map"))
            return blocks.dequantize(source.shape)
        return None

    return read
