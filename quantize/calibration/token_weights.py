"""What each token counts in each input's Gram matrix, on disk: a file a block, read as the block is run.

In: of each block and batch, weights as the backward pass gives them. Out: the same with a mean of 1 for each input,
batch by batch. Left to others: computing them (guide), weighting with them (block_runner).
An input that every token passes has a number for each; that of a routed expert has them for the tokens that it saw.
Beside them: how much each output of each linear matters.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantize.calibration.hidden_states import Batch
from quantize.calibration.vocabulary import VocabularyStatistics, is_of_vocabulary
from quantize.errors import BuildError, disk_errors
from quantize.model.layout import BlockLayout
from quantize.numerics.guidance import mean_of, sum_exactly

ROWS, SUMS, OUTPUTS = ":rows", ":sums", ":outputs"  # what follows an input's key, or a linear's, in a name


@dataclass(frozen=True)
class Weighed:
    """An input's tokens in one batch. values: raw weights, float32. rows: which tokens of the batch, None for all."""

    values: Tensor
    rows: Tensor | None = None


class TableWriter:
    """Collects the weights of one block, batch after batch in order."""

    def __init__(self) -> None:
        self._found: dict[str, list[tuple[int, Weighed]]] = {}
        self._outputs: dict[str, Tensor] = {}

    def add(self, batch: Batch, weighed: Mapping[str, Weighed], outputs: Mapping[str, Tensor]) -> None:
        """Take those of the next batch. outputs: of each linear, sums of squares of the gradient, float64 [out]."""
        for tensor, sums in outputs.items():
            known = self._outputs.get(tensor)
            self._outputs[tensor] = sums.cpu() if known is None else known + sums.cpu()
        for key, item in weighed.items():
            self._found.setdefault(key, []).append((batch.start, item))

    def write(self, path: Path, more: Mapping[str, Tensor] | None = None) -> str:
        """Write the file; hex sha256 of its bytes. more: tensors with names of their own. Raises BuildError,
        DiskFullError.
        """
        tensors = {tensor + OUTPUTS: sums for tensor, sums in self._outputs.items()}
        for key, parts in self._found.items():
            values = [item.values.cpu() for _, item in parts]
            tensors[key] = torch.cat(values)
            tensors[key + SUMS] = torch.tensor([sum_exactly(each.numpy()) for each in values], dtype=torch.float64)
            rows = [item.rows.cpu() + start for start, item in parts if item.rows is not None]
            if rows:
                tensors[key + ROWS] = torch.cat(rows)
        return write_table(path, tensors | dict(more or {}))


@dataclass(frozen=True)
class WeightTable:
    """The files of all blocks. sha256: of each, by block."""

    folder: Path
    sha256: Mapping[int, str]

    def read(self, block: int) -> dict[str, Tensor]:
        """The tensors of one. Raises BuildError: it is not what was written."""
        from safetensors.torch import load

        path = self.folder / table_name(block)
        try:
            data = path.read_bytes()
        except OSError as exc:
            raise _damaged(path) from exc
        if hashlib.sha256(data).hexdigest() != self.sha256[block]:
            raise _damaged(path)
        found: dict[str, Tensor] = load(data)
        return found


@dataclass(frozen=True)
class TokenWeights:
    """The weights of a pass. own: of the tokens that are run here. every: of all tokens, which the means are over."""

    own: WeightTable
    every: Sequence[WeightTable]

    def block(self, index: int, device: torch.device) -> BlockWeights:
        """Those of one block. Raises BuildError: a file is not what was written."""
        read = {table.folder: table.read(index) for table in (self.own, *self.every)}
        parts = [read[table.folder] for table in self.every]
        keys = {name for part in parts for name in part if _is_of_input(name)}
        means = {
            key: mean_of(
                [value for part in parts if key in part for value in part[key + SUMS].tolist()],
                sum(part[key].numel() for part in parts if key in part),
            )
            for key in keys
        }
        return BlockWeights(read[self.own.folder], means, device)


    def outputs(self, layout: BlockLayout) -> dict[str, Tensor]:
        """How much each output of each linear of a block matters, by the name of its weight, float32 [out].

        The mean square gradient of the loss there, over the tokens that the linear has, as a share of all tokens: half
        of it times the squared error of the output, summed over those tokens, is what the error costs, in nats a token.
        Linears that no gradient came to are left out. Raises BuildError: a file is not what was written.
        """
        parts = [table.read(layout.index) for table in self.every]
        counts: dict[str, int] = {}
        for key, values in (item for part in parts for item in part.items()):
            if _is_of_input(key):
                counts[key] = counts.get(key, 0) + values.numel()
        most = max(counts.values(), default=0)
        found = {}
        for linear in layout.linears:
            sums = [part[linear.tensor + OUTPUTS] for part in parts if linear.tensor + OUTPUTS in part]
            if sums and counts.get(linear.input):
                found[linear.tensor] = (torch.stack(sums).sum(0) / (counts[linear.input] * most)).float()
        return found


    def vocabulary(self, blocks: int) -> VocabularyStatistics:
        """Of head and embedding. blocks: of the model. Raises BuildError: a file is not what was written."""
        parts = [{**table.read(0), **table.read(blocks)} for table in self.every]
        return VocabularyStatistics.of(parts)


class BlockWeights:
    """The weights of one block's tokens, each input's with a mean of 1 over all tokens that it has in the pass."""

    def __init__(self, table: Mapping[str, Tensor], means: Mapping[str, float], device: torch.device) -> None:
        self._device = device
        scaled = {
            key: table[key].div(mean) if mean > 0 else torch.ones_like(table[key])  # no gradient came: all are alike
            for key, mean in means.items() if key in table
        }  # fmt: skip
        self._rows = {key: table[key + ROWS] for key in scaled if key + ROWS in table}
        self._few = {key: scaled[key] for key in self._rows}
        self._all = {key: values.to(device) for key, values in scaled.items() if key not in self._rows}

    def batch(self, batch: Batch) -> dict[str, Tensor]:
        """By input key, float32 [tokens of the batch]; NaN for tokens that an input did not have."""
        stop = batch.start + batch.rows
        found = {key: values[batch.start : stop] for key, values in self._all.items()}
        for key, rows in self._rows.items():
            left, right = torch.searchsorted(rows, torch.tensor([batch.start, stop], dtype=rows.dtype)).tolist()
            values = torch.full((batch.rows,), float("nan"))
            values[(rows[left:right] - batch.start).long()] = self._few[key][left:right]
            found[key] = values.to(self._device, non_blocking=True)
        return found


def write_table(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a file; hex sha256 of its bytes. Raises DiskFullError."""
    from safetensors.torch import save

    data = save(dict(tensors))
    with disk_errors(path.parent), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def table_name(block: int) -> str:
    """Name of a block's file; that of the number of blocks has the head's sums."""
    return f"weights.{block:05d}.safetensors"


def _is_of_input(name: str) -> bool:
    """Whether a tensor of a table has the weights of an input's tokens."""
    return not name.endswith((ROWS, SUMS, OUTPUTS)) and not is_of_vocabulary(name)


def _damaged(path: Path) -> BuildError:
    return BuildError(f"the tokens' weights in {path} are damaged or gone", hint="run the same build again")
