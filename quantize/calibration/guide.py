"""Guided statistics: the model forward and back, block by block, for how much each token counts at each linear input.

In: a checkpoint, the calibration set in batches. Out: a WeightTable, which the pass then weights its sums with. On the
way forward the blocks' inputs go to files; at the head a label is drawn for each token from the model itself; on the
way back each block is loaded once more and run again under autograd. Memory holds one block and a few batches,
whatever the depth. Tokens of one sequence depend on no other's: a part of the sequences has the weights that it would
have among all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from quantize.calibration.backward import BlockBackward
from quantize.calibration.block_reader import TensorSource, read_blocks
from quantize.calibration.block_runner import BlockRunner
from quantize.calibration.budget import kept_every
from quantize.calibration.guide_files import GRADIENTS, INPUTS, TABLES, GuideFiles
from quantize.calibration.hidden_states import Batch
from quantize.calibration.output_head import OutputHead
from quantize.calibration.stream import Precision, arranged, embed_all, over_batches
from quantize.calibration.token_weights import TableWriter, Weighed, WeightTable, write_table
from quantize.calibration.vocabulary import EmbeddingSums, HeadSums
from quantize.events import Reporter, progress
from quantize.model.architecture import block_count, block_layouts
from quantize.numerics.constants import batch_tokens
from quantize.numerics.guidance import uniform_draws
from quantize.system.memory import give_back_freed

GUIDE = "guide"  # the folder of all this in that of the pass


@dataclass(frozen=True)
class Text:
    """What is run. batches: with rows counted from 0. sequences: in their order. draws: a number for each token."""

    batches: Sequence[Batch]
    sequences: Sequence[Tensor]
    draws: Tensor

    @classmethod
    def of(cls, token_ids: Sequence[Sequence[int] | Tensor], seed: int, device: str) -> Text:
        """A whole calibration set, as the pass on such a device runs it. seed: of the draws."""
        batches, sequences = arranged(token_ids, batch_tokens(device))
        return cls(batches, sequences, uniform_draws(sum(batch.rows for batch in batches), seed))


def find_weights(
    checkpoint: TensorSource, text: Text, folder: Path, identity: Mapping[str, Any], *, device: str,
    precision: Precision, reporter: Reporter, after_block: Callable[[], None] = lambda: None,
) -> WeightTable:  # fmt: skip
    """The weights of all tokens, from `folder` as far as an earlier run with the same identity left them there.

    after_block: called where a stopped build can go on from. Raises CheckpointError, BuildError, DiskFullError; what
    after_block raises.
    """
    files = GuideFiles(folder, {**identity, "outputs": True}, reporter)  # a table of before has none
    good = [files.has(TABLES, block) for block in range(block_count(checkpoint.config) + 1)]  # looks at every one
    if not all(good):
        _Guide(checkpoint, text, files, device, precision, reporter, after_block).run()
        give_back_freed()
    files.commit(*((kind, block) for kind in (INPUTS, GRADIENTS) for block in files.blocks(kind)))
    return WeightTable(folder, files.hashes(TABLES))


class _Guide:
    """One way forward and back."""

    def __init__(
        self, checkpoint: TensorSource, text: Text, files: GuideFiles, device: str, precision: Precision,
        reporter: Reporter, after_block: Callable[[], None],
    ) -> None:  # fmt: skip
        self._checkpoint, self._text, self._files = checkpoint, text, files
        self._reporter, self._after_block = reporter, after_block
        self._runner = BlockRunner(checkpoint.config, device, precision)
        self._layouts = list(block_layouts(checkpoint.config))
        self._tokens = sum(batch.rows for batch in text.batches)
        self._every = kept_every(len(self._layouts), 4 * self._tokens * self._runner.hidden_size)

    def run(self) -> None:
        """Leave the weights of every block in its file."""
        self._begin()
        end = self._gradient()
        if end is None:
            end = len(self._layouts)
            self._bring(range(0, end, self._every), end)
            self._turn()
        for start in reversed(range(0, end, self._every)):
            stop = min(start + self._every, end)
            self._bring(range(start, stop), stop - 1)
            self._back(start, stop)

    def _begin(self) -> None:
        """Have the first block's input on disk, and learn each length's masks and positions."""
        if self._files.has(INPUTS, 0):
            embed_all(self._checkpoint, self._runner, list(self._text.sequences), None)
            return
        file = self._files.open(INPUTS, 0)
        embed_all(self._checkpoint, self._runner, list(self._text.sequences), file)
        self._files.took(INPUTS, 0, file.sha256)
        self._files.commit()

    def _gradient(self) -> int | None:
        """The block whose input has its gradient on disk, and from which on all have weights; None: there is none."""
        end = len(self._layouts)
        if not self._files.has(TABLES, end):
            return None
        while end and self._files.has(TABLES, end - 1):
            end -= 1
        known = range(end, len(self._layouts) + 1)
        return next((block for block in known if self._files.has(GRADIENTS, block)), None)

    def _bring(self, wanted: Sequence[int], last: int) -> None:
        """Have the inputs of the wanted blocks on disk, and that of `last`; those on the way to them go again."""
        lacking = [block for block in (*wanted, last) if not self._files.has(INPUTS, block)]
        if not lacking:
            return
        start = next(block for block in reversed(range(lacking[0])) if self._files.has(INPUTS, block))
        for layout, weights in read_blocks(self._checkpoint, self._layouts[start:last], self._runner.device):
            self._runner.load(layout, weights)
            del weights
            self._forward(layout.index)
            self._runner.unload(layout.index)
            give_back_freed()
            stays = layout.index in wanted or layout.index % self._every == 0
            self._files.commit(*() if stays else ((INPUTS, layout.index),))
            self._say(layout.index + 1)
            self._after_block()

    def _forward(self, block: int) -> None:
        file = self._files.open(INPUTS, block + 1)
        for batch, output in over_batches(self._text.batches, partial(self._ran, block), self._runner.device.type):
            file.write(batch, output)
        file.advance()
        self._files.took(INPUTS, block + 1, file.sha256)

    def _ran(self, block: int, batch: Batch) -> Tensor:
        return self._runner.run(block, self._read(INPUTS, block, batch))

    def _turn(self) -> None:
        """The gradient after the last block, of the loss with labels that are drawn from the model itself."""
        end, device = len(self._layouts), self._runner.device
        head, file = OutputHead(self._runner, self._checkpoint), self._files.open(GRADIENTS, end)
        sums = HeadSums(self._runner.width, head.vocabulary, device)
        head.watch(sums.add)
        for batch in self._text.batches:
            states = self._read(INPUTS, end, batch).flatten(0, 1)
            draws = self._text.draws[batch.start : batch.start + batch.rows].to(device)
            file.write(batch, head.back(states, draws))
        file.advance()
        head.close()
        self._files.took(GRADIENTS, end, file.sha256)
        self._files.took(TABLES, end, write_table(self._files.path(TABLES, end), sums.tensors()))
        self._files.commit((INPUTS, end))
        self._after_block()

    def _back(self, start: int, stop: int) -> None:
        """From the gradient after blocks [start, stop) to that before them; their weights on the way."""
        layouts = self._layouts[start:stop][::-1]
        for layout, weights in read_blocks(self._checkpoint, layouts, self._runner.device):
            block = layout.index
            self._runner.load(layout, weights)
            del weights
            with BlockBackward(self._runner, layout).watching() as backward:
                self._back_through(block, backward)
            self._runner.unload(block)
            give_back_freed()
            self._files.commit((GRADIENTS, block + 1), *() if block == 0 else ((INPUTS, block),))
            self._say(2 * len(self._layouts) - block)
            self._after_block()

    def _back_through(self, block: int, backward: BlockBackward) -> None:
        table, file, embedded = TableWriter(), self._files.open(GRADIENTS, block), EmbeddingSums(self._text.sequences)

        def back(batch: Batch) -> tuple[Tensor, dict[str, Weighed], dict[str, Tensor]]:
            return backward.run(self._read(INPUTS, block, batch), self._read(GRADIENTS, block + 1, batch))

        for batch, (gradient, weighed, outputs) in over_batches(self._text.batches, back, self._runner.device.type):
            file.write(batch, gradient)
            table.add(batch, weighed, outputs)
            if block == 0:
                embedded.add(self._read(INPUTS, block, batch), gradient)
        file.advance()
        more = embedded.tensors() if block == 0 else {}
        self._files.took(TABLES, block, table.write(self._files.path(TABLES, block), more))
        self._files.took(GRADIENTS, block, file.sha256)

    def _read(self, kind: str, block: int, batch: Batch) -> Tensor:
        return self._files.read(kind, block, batch, self._runner.hidden_size, self._runner.device)

    def _say(self, blocks: int) -> None:
        total = 2 * len(self._layouts) * self._tokens
        progress(self._reporter, "", "guided statistics, tokens x blocks", blocks * self._tokens, total)
