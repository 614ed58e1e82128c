"""The output head and the token embedding: what guided statistics say of them, kept for choosing types and solving.

In: VocabularyStatistics of the pass. Out: a file in scratch; the Gram matrix that the head is solved with, and what the
errors of both cost. Where the embedding is the head too, both count.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.errors import disk_errors
from quantize.files.gguf import GgufFile
from quantize.formats.gguf.imatrix import gguf_names
from quantize.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from quantize.calibration.vocabulary import VocabularyStatistics

NAME = "vocabulary.safetensors"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
ROWS_AT_ONCE = 4096  # that are converted


def write_vocabulary(folder: Path, found: VocabularyStatistics) -> Path:
    """Keep the statistics; the file."""
    import torch
    from safetensors.torch import save_file

    tensors = {name: value for name, value in vars(found).items() if name != "length"}
    path = folder / NAME
    with disk_errors(folder):
        save_file({**tensors, "length": torch.tensor(found.length, dtype=torch.float64)}, path)
    return path


def read_vocabulary(folder: Path) -> VocabularyStatistics | None:
    """What was kept; None where statistics were not guided, or nothing asked for it."""
    from safetensors.torch import load_file

    from quantize.calibration.vocabulary import VocabularyStatistics

    if not (folder / NAME).is_file():
        return None
    with disk_errors(folder):
        found = load_file(folder / NAME)
    return VocabularyStatistics(**{**found, "length": float(found["length"])})


def source_of(name: str, exact: GgufFile, checkpoint: Checkpoint) -> str | None:
    """The source's tensor that head or embedding is in the file; None where it is no single one of the same shape."""
    named = gguf_names(str(exact.fields["general.architecture"]), checkpoint)
    for tensor, info in checkpoint.tensors.items():
        if info.shape == exact.tensors[name].shape[::-1] and named(tensor)[0] == name:
            return tensor
    return None


class VocabularyLoss:
    """What errors of head or embedding cost, in nats a token. weight: the matrix [vocabulary, hidden], of any type."""

    def __init__(self, found: VocabularyStatistics, weight: Tensor, *, is_head: bool, is_embedding: bool) -> None:
        import torch

        rows = len(weight)
        counts = found.counts[:rows].double()
        parts = zip(torch.split(weight, ROWS_AT_ONCE), torch.split(counts, ROWS_AT_ONCE), strict=True)
        lengths = (float((times * part.double().square().sum(1)).sum()) for part, times in parts)
        length = sum(lengths) / max(1.0, float(counts.sum()))
        scale = found.length / length if length > 0 else 1.0  # of an embedding that is multiplied as it comes out
        self._gram = found.gram if is_head else None
        self._outputs = found.outputs[:rows].double()
        self._counts = counts if is_embedding else counts * 0
        self._channels = found.channels.double() * scale

    def of(self, errors: Iterable[Tensor], rows: slice) -> float:
        """Of an error, [some rows, hidden] a piece after another; as if all rows had it, where they are some of all."""
        from quantize.numerics.gptq import row_losses

        outputs, counts = self._outputs[rows], self._counts[rows]
        of_head, of_embedding, start = 0.0, 0.0, 0
        for error in errors:
            part = slice(start, start + len(error))
            start += len(error)
            if self._gram is not None:
                of_head += float((row_losses(error, self._gram).double() * outputs[part]).sum())
            of_embedding += float(((error.double().square() @ self._channels) * counts[part]).sum())
        total = of_head * _share(self._outputs, outputs) + of_embedding * _share(self._counts, counts)
        return max(0.0, total / 2)

    def gram(self) -> Tensor:
        """What its rows are solved with, float32 [hidden, hidden]: the two losses at the rate that they have over all
        rows. A row by itself may have another rate.
        """
        import torch

        counts, outputs = float(self._counts.sum()), float(self._outputs.sum())
        if self._gram is None:
            return torch.diag(self._channels).float()
        rate = counts / outputs if outputs > 0 else 0.0
        return self._gram + torch.diag(self._channels * rate).float()


def _share(every: Tensor, some: Tensor) -> float:
    """How many times more all weights are than those of some rows."""
    part = float(some.sum())
    return float(every.sum()) / part if part > 0 else 0.0
