"""The dequantized view of a packed safetensors artifact, one linear at a time.

In: the folder of a GPTQ or AWQ artifact. Out: float32 weights by module name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.checkpoint import INDEX_NAME
from quantize.containers.safetensors import read_header
from quantize.errors import VerifyError

if TYPE_CHECKING:
    import torch


class PackedWeights:
    """Packed linears of a folder."""

    def __init__(self, folder: Path, method: str, bits: int, places: dict[str, Path]) -> None:
        self._folder, self._method, self._bits, self._places = folder, method, bits, places
        self.linears = sorted(name.removesuffix(".qweight") for name in places if name.endswith(".qweight"))

    def dequantize(self, linear: str) -> torch.Tensor:
        """float32 [out, in] of one linear. Raises VerifyError if it is not in the artifact."""
        from quantize.numerics.packing import AwqTensors, GptqTensors, unpack_awq, unpack_gptq

        if f"{linear}.qweight" not in self._places:
            raise VerifyError(f"{self._folder.name}: no packed tensors for {linear}")
        words, zeros, scales = (self._read(f"{linear}.{part}") for part in ("qweight", "qzeros", "scales"))
        if self._method == "awq":
            return unpack_awq(AwqTensors(words, zeros, scales)).dequantize()
        index = self._read(f"{linear}.g_idx")
        return unpack_gptq(GptqTensors(words, zeros, scales, index), self._bits).dequantize()

    def _read(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self._places[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor


def open_packed(folder: Path, method: str) -> PackedWeights:
    """Open an artifact's folder. Raises VerifyError, CheckpointError."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    files = [folder / "model.safetensors"]
    index = folder / INDEX_NAME
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    places = {name: path for path in files for name in read_header(path)}
    return PackedWeights(folder, method, int(config["quantization_config"]["bits"]), places)
