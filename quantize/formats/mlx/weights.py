"""The matrices of an MLX artifact as float32, one at a time; the arithmetic is in numerics/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import VerifyError
from quantize.files.safetensors import TensorInfo, read_tensor
from quantize.formats.folder import not_packed
from quantize.formats.format import Options, Reader
from quantize.model.checkpoint import Checkpoint, read_json, tensor_table

if TYPE_CHECKING:
    from torch import Tensor

SCALES = "scales"


@dataclass(frozen=True)
class MlxWeights:
    """See Weights."""

    folded: bool = False

    def reader(self, path: Path, checkpoint: Checkpoint) -> Reader:
        """See Weights."""
        table, settings = tensor_table(path), quantization(path)

        def read(name: str, source: Tensor) -> Tensor | None:
            stem = name.removesuffix("weight")
            return dequantize(table, stem, settings) if f"{stem}{SCALES}" in table else None

        return read

    def left(self, path: Path, names: Sequence[str], options: Options) -> list[str]:
        """See Weights."""
        return not_packed(path, names, (SCALES,))


def quantization(folder: Path) -> Mapping[str, Any]:
    """`quantization` of config.json. Raises VerifyError: there is none that can be read; CheckpointError."""
    found = read_json(folder / "config.json").get("quantization")
    if not isinstance(found, dict) or not all(isinstance(found.get(key), int) for key in ("bits", "group_size")):
        raise VerifyError(f"{folder.name}: its config.json does not say how many bits a weight has")
    return found


def quantized_linears(table: Mapping[str, TensorInfo]) -> list[str]:
    """The linears that the files have quantized, by their path in the model."""
    return sorted(name.removesuffix(f".{SCALES}") for name in table if name.endswith(f".{SCALES}"))


def dequantize(table: Mapping[str, TensorInfo], stem: str, settings: Mapping[str, Any]) -> Tensor:
    """float32 [out, in] of one linear. stem: its tensors' names up to the last part."""
    import torch

    from quantize.numerics.dequantize import mxfp4_rows, scaled
    from quantize.numerics.packing import unpack_rows

    words, scales = read_tensor(table[f"{stem}weight"]), read_tensor(table[f"{stem}{SCALES}"])
    mode = settings.get("mode", "affine")
    if mode == "affine":
        width = scales.shape[1] * int(settings["group_size"])
        codes = unpack_rows(words.view(torch.int32), int(settings["bits"]), width)
        biases = read_tensor(table[f"{stem}biases"]).float()
        return scaled(codes, scales) + biases.repeat_interleave(int(settings["group_size"]), dim=1)
    octets = words.view(torch.uint8)
    if mode == "mxfp4":
        return mxfp4_rows(octets, scales)
    from quantize.numerics.dequantize import e2m1

    return scaled(e2m1(octets), scales.view(torch.float8_e4m3fn))
