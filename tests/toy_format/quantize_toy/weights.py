"""The toy's matrices as the numbers that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.formats.format import Options, Reader
from quantize.model.checkpoint import Checkpoint
from quantize_toy.container import CODES, SCALES, ToyFile

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ToyWeights:
    """See Weights."""

    folded: bool = False

    def reader(self, path: Path, checkpoint: Checkpoint) -> Reader:
        """See Weights."""
        file = ToyFile(path)

        def read(name: str, source: Tensor) -> Tensor | None:
            linear = name.removesuffix(".weight")
            if linear not in file.linears:
                return None
            import torch

            return torch.from_numpy(file.array(linear + CODES) * file.array(linear + SCALES)[:, None])

        return read

    def left(self, path: Path, names: Sequence[str], options: Options) -> list[str]:
        """See Weights."""
        have = ToyFile(path).linears
        return [name for name in names if name.removesuffix(".weight") not in have]
