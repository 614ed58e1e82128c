"""The dequantized view of a packed safetensors artifact, one linear at a time.

In: the folder of a GPTQ or AWQ artifact. Out: float32 weights by module name, or by the source's tensor names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.errors import VerifyError
from quantize.files.safetensors import TensorInfo, read_tensor
from quantize.formats.folder import not_packed
from quantize.formats.format import Options, Reader
from quantize.model.checkpoint import Checkpoint, read_json, tensor_table

if TYPE_CHECKING:
    import torch
    from torch import Tensor


PACKED = ".qweight"


@dataclass(frozen=True)
class PackedMatrices:
    """See Weights. method: which of the two layouts the words are packed in."""

    method: str
    folded: bool

    def reader(self, path: Path, checkpoint: Checkpoint) -> Reader:
        """See Weights."""
        packed = open_packed(path, self.method)
        known = frozenset(packed.linears)

        def read(name: str, source: Tensor) -> Tensor | None:
            linear = name.removesuffix(".weight")
            return packed.dequantize(linear) if linear in known else None

        return read

    def left(self, path: Path, names: Sequence[str], options: Options) -> list[str]:
        """See Weights."""
        return not_packed(path, names, ("qweight",))


class PackedWeights:
    """Packed linears of a folder. bits: of each weight."""

    def __init__(self, folder: Path, method: str, bits: int, table: Mapping[str, TensorInfo]) -> None:
        self._folder, self._method, self.bits, self._table = folder, method, bits, table
        self.linears = sorted(_linears(table))

    def words(self, linear: str) -> dict[str, torch.Tensor]:
        """The tensors of one linear, as stored, by the last part of their names. Raises VerifyError: there are none."""
        if linear + PACKED not in self._table:
            raise VerifyError(f"{self._folder.name}: no packed tensors for {linear}")
        parts = ("qweight", "qzeros", "scales", *(() if self._method == "awq" else ("g_idx",)))
        return {part: read_tensor(self._table[f"{linear}.{part}"]) for part in parts}

    def outputs(self, linear: str) -> int:
        """How many outputs a linear has. Raises KeyError: it is not in the artifact."""
        return self._table[f"{linear}.scales"].shape[1]

    def group_size(self, linear: str) -> int:
        """How many weights share a scale. Raises KeyError: it is not in the artifact."""
        inputs = self._table[f"{linear}.{'qweight' if self._method == 'awq' else 'g_idx'}"].shape[0]
        return inputs // self._table[f"{linear}.scales"].shape[0]

    def dequantize(self, linear: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """float32 [out, in] of one linear, unpacked on a device. Raises VerifyError if it is not in the artifact."""
        from quantize.numerics.packing import AwqTensors, GptqTensors, unpack_awq, unpack_gptq

        words = [part.to(device) for part in self.words(linear).values()]
        if self._method == "awq":
            return unpack_awq(AwqTensors(*words)).dequantize()
        return unpack_gptq(GptqTensors(*words), self.bits).dequantize()


def packed_linears(folder: Path) -> set[str]:
    """The linears that the files have as packed words, by their path in the model. Raises CheckpointError."""
    return _linears(tensor_table(folder))


def _linears(names: Iterable[str]) -> set[str]:
    return {name.removesuffix(PACKED) for name in names if name.endswith(PACKED)}


def open_packed(folder: Path, method: str) -> PackedWeights:
    """Open an artifact's folder. Raises VerifyError, CheckpointError."""
    settings = read_json(folder / "config.json").get("quantization_config")
    bits = settings.get("bits") if isinstance(settings, dict) else None
    if not isinstance(bits, int):
        raise VerifyError(f"{folder.name}: its config.json does not say how many bits a weight has")
    return PackedWeights(folder, method, bits, tensor_table(folder))
