"""One pass over a calibration set, a decoder block at a time: the statistics that every calibrated format needs.

In: a checkpoint (config, lazy tensors) and token ids. Out: an iterator of blocks, each with its weights and a Gram
matrix for every distinct input of its linears. Left to others: solving, folding, writing (numerics, builders).
Blocks see full-precision inputs, so each can be solved on its own; memory holds one block, its Gram matrices and the
hidden states, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from quantize.calibration.block_reader import TensorSource, read_blocks
from quantize.calibration.block_runner import ROUND_BATCHES, BlockRunner, share_of
from quantize.calibration.hidden_states import (
    Batch,
    FileStates,
    HiddenStates,
    MemoryStates,
    SavedStates,
    States,
    make_batches,
    remove_before,
)
from quantize.calibration.token_weights import BlockWeights, TokenWeights
from quantize.calibration.vocabulary import VocabularyStatistics
from quantize.errors import BuildError, CheckpointError
from quantize.events import Reporter, SilentReporter, progress, warn
from quantize.model.architecture import block_layouts
from quantize.model.layout import BlockLayout, Linear
from quantize.numerics.constants import batch_tokens, shares_on
from quantize.numerics.gptq import estimated_loss
from quantize.numerics.gram import Gram
from quantize.system.memory import give_back_freed
from quantize.system.threads import in_turn, split_threads

Precision = Literal["float32", "bfloat16"]
Result = TypeVar("Result")


def fastest_precision(device: str) -> Precision:
    """The type in which the forward pass is fastest on this machine: bfloat16 where hardware multiplies it."""
    if torch.device(device).type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


@dataclass(frozen=True)
class Block:
    """One decoder block and the statistics of what its linears read.

    weights: full tensor name -> float32 tensor (exact for float16 and bfloat16 sources). grams: input key -> Gram.
    inputs: full weight name of each linear -> its input key. outputs: full weight name -> how much each of its
    outputs matters (TokenWeights.outputs), of guided statistics. vocabulary: with the last block, of the same.
    """

    index: int
    layout: BlockLayout
    weights: dict[str, Tensor]
    grams: dict[str, Gram]
    inputs: dict[str, str]
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    vocabulary: VocabularyStatistics | None = None
    _energies: dict[str, float] = field(default_factory=dict, repr=False)

    def share(self, loss: float, linear: Linear) -> float:
        """A squared output error over the calibration tokens as a share of the output's energy tr(W G Wᵀ)."""
        if linear.tensor not in self._energies:
            gram = self.grams[linear.input].matrix
            self._energies[linear.tensor] = estimated_loss(self.weights[linear.tensor], gram)
        energy = self._energies[linear.tensor]
        return float(f"{loss / energy:.6g}") if energy > 0 else 0.0


@dataclass(frozen=True)
class Spill:
    """Where hidden states go. folder: on disk. budget_bytes: kept in memory up to that, None for any size.

    saved: what an earlier run left there; the pass goes on from it. keep: called after each block but the last with the
    states that go into the next one, before the block is yielded. gpu_bytes: kept on the GPU up to that, if the pass
    runs on one; None for any size.
    """

    folder: Path | None = None
    budget_bytes: int | None = None
    saved: SavedStates | None = None
    keep: Callable[[HiddenStates], None] | None = None
    gpu_bytes: int | None = None


class Passenger(Protocol):
    """Other text that goes through the blocks of a pass on a CPU, whose weights are read once for both."""

    def begin(self, block: int) -> None:
        """The pass begins with this block."""

    def take(self, layout: BlockLayout, weights: dict[str, Tensor]) -> None:
        """The next block, with its float32 weights by full name, before the pass runs it. They must not change."""


def stream_blocks(
    checkpoint: TensorSource,
    token_ids: Sequence[Sequence[int] | Tensor],
    *,
    device: str = "cpu",
    precision: Precision = "float32",
    spill: Spill | None = None,
    start_block: int = 0,
    tokens_per_batch: int | None = None,
    reporter: Reporter | None = None,
    guide: TokenWeights | None = None,
    passenger: Passenger | None = None,
) -> Iterator[Block]:
    """Yield each block from `start_block` on, with its weights and Gram matrices. guide: what each token counts.

    Sequences may differ in length; equal ones run together and none is padded. Blocks before `start_block` are run
    without statistics, from the first one or from saved states. Drop what a yielded Block holds before asking for the
    next one.

    Raises:
        CheckpointError: an architecture whose blocks can't be run one at a time, or tensors that don't fit it.
        BuildError: no tokens, no folder to spill to, or the disk failed.
    """
    events, spill = reporter or SilentReporter(), spill or Spill()
    batches, ordered = arranged(token_ids, tokens_per_batch or batch_tokens(device))
    if not ordered:
        raise BuildError("the calibration set has no tokens")
    runner = BlockRunner(checkpoint.config, device, precision)
    tokens = sum(len(ids) for ids in ordered)
    states = open_states(runner, tokens, spill)
    first = _first_block(states, spill.saved, start_block, events)
    embed_all(checkpoint, runner, ordered, states if first is None else None)
    if passenger is not None:
        passenger.begin(first or 0)
    total = tokens * runner.blocks
    layouts = list(block_layouts(checkpoint.config))
    for layout, weights in read_blocks(checkpoint, layouts[first or 0 :], runner.device):
        if passenger is not None:
            passenger.take(layout, weights)
        runner.load(layout, weights)
        index, last = layout.index, layout.index == runner.blocks - 1
        grams = None
        if index >= start_block:
            counted = None if guide is None else guide.block(index, runner.device)
            grams = _record(runner, layout, batches, states, last, counted)
        else:
            for batch in batches:
                states.write(batch, runner.run(index, states.read(batch)))
        progress(events, "", "calibration pass, tokens x blocks", (index + 1) * tokens, total)
        runner.unload(index)
        if not last:
            states.advance()
            if spill.keep is not None:
                spill.keep(states)
            elif spill.folder is not None:
                remove_before(spill.folder, index + 1)
        if grams is not None:
            _report_notes(events, index, grams)
            inputs = {linear.tensor: linear.input for linear in layout.linears}
            outputs = {} if guide is None else guide.outputs(layout)
            ends = guide.vocabulary(runner.blocks) if guide is not None and last else None
            yield Block(index, layout, weights, grams, inputs, outputs, ends)
        del weights, grams
        give_back_freed()


def arranged(
    token_ids: Sequence[Sequence[int] | Tensor], tokens_per_batch: int
) -> tuple[list[Batch], list[Tensor]]:  # fmt: skip
    """A calibration set in batches, and its sequences in their order."""
    sequences = as_sequences(token_ids)
    batches = make_batches([len(ids) for ids in sequences], tokens_per_batch)
    return batches, [sequences[member] for batch in batches for member in batch.members]


def as_sequences(token_ids: Sequence[Sequence[int] | Tensor]) -> list[Tensor]:
    """Each sequence as int64 [length], without those that are empty."""
    sequences = [torch.as_tensor(ids, dtype=torch.long).reshape(-1) for ids in token_ids]
    return [ids for ids in sequences if ids.numel()]


def open_states(runner: BlockRunner, tokens: int, spill: Spill) -> HiddenStates:
    """Hidden states for so many tokens: on the GPU if they fit, else in memory if the budget allows, else in files.

    Raises BuildError: no folder to spill to.
    """
    size = 4 * tokens * runner.hidden_size
    if runner.device.type == "cuda" and (spill.gpu_bytes is None or size <= spill.gpu_bytes):
        return MemoryStates(tokens, runner.hidden_size, runner.device, spill.folder, held=runner.device)
    if spill.budget_bytes is None or size <= spill.budget_bytes:
        return MemoryStates(tokens, runner.hidden_size, runner.device, spill.folder)
    if spill.folder is None:
        raise BuildError(
            f"hidden states need {size} bytes, more than the budget of {spill.budget_bytes}",
            hint="give a folder to spill them to",
        )
    return FileStates(tokens, runner.hidden_size, runner.device, spill.folder)


def _first_block(states: HiddenStates, saved: SavedStates | None, start_block: int, events: Reporter) -> int | None:
    """The block whose input `states` now hold, from an earlier run; None if there is none that helps."""
    if saved is None or saved.block > start_block:
        return None
    if states.load(saved):
        return saved.block
    warn(events, "", "the hidden states of the stopped build are damaged or gone; the blocks are run again")
    return None


def embed_all(checkpoint: TensorSource, runner: BlockRunner, sequences: list[Tensor], states: States | None) -> None:
    """Write the first block's input; with states None, only learn each length's masks and positions."""
    missing = [name for name, _ in runner.anatomy.entry if name not in checkpoint.tensors]
    if missing:
        raise CheckpointError(f"the checkpoint has no tensor {missing[0]}")
    start = 0
    for embedded in runner.embed(checkpoint.read, sequences):
        if states is not None:
            states.write(Batch((0,), embedded.shape[0], start), embedded)
        start += embedded.shape[0]
    if states is not None:
        states.advance()


def over_batches(
    batches: Sequence[Batch], work: Callable[[Batch], Result], device: str
) -> Iterator[tuple[Batch, Result]]:
    """Each batch with what `work` gives for it, in order; on a CPU several at once, each with a part of the threads."""
    with split_threads(shares_on(device)) as pools:
        yield from zip(batches, in_turn([partial(work, batch) for batch in batches], pools), strict=True)


def _record(
    runner: BlockRunner, layout: BlockLayout, batches: list[Batch], states: HiddenStates, last: bool,
    weights: BlockWeights | None,
) -> dict[str, Gram]:  # fmt: skip
    """Run a block over all batches; on a CPU the shares run at once, each with its part of the threads.

    A batch's products are too small for many threads: two batches on a thread each take less time than one after the
    other on two.
    """
    device = runner.device.type
    with runner.recording(layout, output_needed=not last) as recorder:

        def run(number: int) -> Tensor | None:
            batch = batches[number]
            counted = None if weights is None else weights.batch(batch)
            return recorder.run(states.read(batch), share_of(number, device), counted)

        with split_threads(shares_on(device)) as pools:
            for start in range(0, len(batches), ROUND_BATCHES):
                numbers = range(start, min(start + ROUND_BATCHES, len(batches)))
                outputs = in_turn([partial(run, number) for number in numbers], pools)
                for number, output in zip(numbers, outputs, strict=True):
                    if output is not None and not last:
                        states.write(batches[number], output)
                recorder.settle()
        return recorder.finish()


def _report_notes(events: Reporter, index: int, grams: dict[str, Gram]) -> None:
    starved = [gram.note for gram in grams.values() if gram.note]
    if starved:
        warn(events, "", f"block {index}: {len(starved) // 2} starved experts; {starved[0]}")
