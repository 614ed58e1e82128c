"""The matrices of a compressed-tensors artifact as float32, one at a time, and what its activations are rounded to.

In: the folder of an artifact. Out: float32 [out, in] by the source's tensor names. How the tensors of a linear go
together is model/quantized.py's to say, which reads such folders as sources too; the arithmetic is in numerics/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.files.safetensors import TensorInfo, read_tensor
from quantize.formats.folder import not_packed
from quantize.formats.format import Options, Product, Reader
from quantize.model.checkpoint import Checkpoint, read_json, tensor_table
from quantize.model.quantized import Dequantized, dequantized_table, schemes_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CompressedWeights:
    """See Weights: AWQ's scales are in neighbors."""

    folded: bool = True

    def reader(self, path: Path, checkpoint: Checkpoint) -> Reader:
        """See Weights."""
        opened = _Opened.of(path)
        return lambda name, _source: opened.matrix(name)

    def left(self, path: Path, names: Sequence[str], options: Options) -> list[str]:
        """See Weights."""
        return not_packed(path, names, ("weight_scale",))


@dataclass(frozen=True)
class _Opened:
    """A folder's tensors as they are stored, and as they are once dequantized."""

    stored: Mapping[str, TensorInfo]
    table: Mapping[str, Dequantized]

    @classmethod
    def of(cls, folder: Path) -> _Opened:
        stored = tensor_table(folder)
        return cls(stored, dequantized_table(stored, read_json(folder / "config.json")))

    def matrix(self, name: str) -> Tensor | None:
        """float32; None where it is not quantized."""
        found = self.table.get(name)
        if found is None or found.read is None:
            return None
        return found.read(lambda part: read_tensor(self.stored[part]))


def quantized_linears(folder: Path) -> list[str]:
    """The weights that the files have quantized, by name. Raises CheckpointError."""
    return sorted(name for name, item in _Opened.of(folder).table.items() if item.read is not None)


def rounded_products(folder: Path) -> Callable[[str], Product] | None:
    """The product of inputs that are rounded first, as a runtime multiplies, for the weight of a linear by its name;
    None where inputs stay as they are. Raises CheckpointError.
    """
    rounding = _input_rounding(folder)
    if rounding is None:
        return None
    opened = _Opened.of(folder)

    def product(name: str) -> Product:
        matrix = opened.matrix(name)
        assert matrix is not None
        return partial(_multiply, matrix, rounding)

    return product


def _multiply(
    matrix: Tensor, rounding: Callable[[Tensor], Tensor], inputs: Tensor, bias: Tensor | None
) -> Tensor:
    from torch.nn.functional import linear

    return linear(rounding(inputs), matrix, bias)


def _input_rounding(folder: Path) -> Callable[[Tensor], Tensor] | None:
    """What becomes of the inputs [..., in] of quantized linears; None where it is nothing."""
    settings = read_json(folder / "config.json").get("quantization_config")
    schemes = schemes_of(settings) if isinstance(settings, dict) else []
    inputs = next((item for scheme in schemes if isinstance(item := scheme.get("input_activations"), dict)), None)
    if inputs is None:
        return None
    from quantize.numerics.activations import round_to_fp8, round_to_int8

    return round_to_int8 if inputs.get("type") == "int" else partial(round_to_fp8, group=inputs.get("group_size"))
