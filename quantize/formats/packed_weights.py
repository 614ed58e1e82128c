"""What AWQ and GPTQ artifacts have in common once they are built: their runtime, their memory, their matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.estimate.vram import VramProfile
from quantize.formats.format import Options, Reader
from quantize.formats.unpack import open_packed
from quantize.formats.ways import SERVE, SGLANG, VLLM, in_transformers
from quantize.model.checkpoint import Checkpoint, tensor_table
from quantize.runtimes.transformers.kind import Transformers

if TYPE_CHECKING:
    from torch import Tensor

# gptqmodel refuses to start with fewer workers, on machines of few cores.
GPTQMODEL = Transformers("gptqmodel", helper="gptqmodel", environment={"GPTQMODEL_CPU_WORKERS": "2"})
PACKED_VRAM = VramProfile("vllm", unpacked_bytes=2 * 4)
WAYS = (VLLM, SGLANG, in_transformers("gptqmodel"), SERVE)


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


def not_packed(folder: Path, names: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """Of the linears, those beside which no tensor with one of the suffixes lies."""
    have = tensor_table(folder)
    return [name for name in names if not any(name.removesuffix("weight") + suffix in have for suffix in suffixes)]
