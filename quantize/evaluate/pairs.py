"""The matrices of an artifact as floating-point weights, beside those of its source, one at a time.

In: an artifact, the source checkpoint. Out: pairs of float32 [out, in] tensors. What the format folds into neighbors is
still in; who compares takes it out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantize.formats.format import Reader
from quantize.model.architecture import block_layouts
from quantize.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """One matrix: what the artifact stands for, and what the source has, both float32 [out, in]."""

    tensor: str
    artifact: Tensor
    source: Tensor


def matrices(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the linears in the source's decoder blocks. Raises CheckpointError: blocks that are not known."""
    return tuple(linear.tensor for layout in block_layouts(checkpoint.config) for linear in layout.linears)


def pairs(read: Reader, checkpoint: Checkpoint) -> Iterator[Pair]:
    """Every linear that both have. Raises CheckpointError, VerifyError: a tensor can't be read."""
    for name in matrices(checkpoint):
        source = checkpoint.read(name).float()
        found = read(name, source)
        if found is not None:
            yield Pair(name, found, source)
