"""What one worker of a spread pass does: the forward pass of a share, the sum of all shares, the solve of one variant.

In: the plan of the pass, results of others as arrays. Out: arrays, by which machines talk. Left to others: who does
what when (schedule), how it gets there (pool). A worker holds one block's weights and the hidden states of its shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from quantize.calibration.block_reader import read_block
from quantize.calibration.block_runner import BlockRunner, ShareSums, share_of
from quantize.calibration.budget import gpu_pass_bytes
from quantize.calibration.guide import GUIDE, Text, find_weights
from quantize.calibration.hidden_states import Batch, HiddenStates, SavedStates, make_batches
from quantize.calibration.stream import (
    Block,
    Precision,
    Spill,
    as_sequences,
    embed_all,
    open_states,
)
from quantize.calibration.token_weights import TokenWeights, WeightTable
from quantize.errors import BuildError
from quantize.events import Event, ListReporter
from quantize.formats import builders
from quantize.formats.base import Collector, Context
from quantize.model.architecture import block_layout
from quantize.model.layout import BlockLayout
from quantize.numerics.constants import batch_tokens
from quantize.numerics.gram import Gram, GramAccumulator
from quantize.numerics.guidance import uniform_draws
from quantize.system.memory import free_gpu_bytes, give_back_gpu

Key = TypeVar("Key")
Matrix = NDArray[np.float32]
# ShareSums: (sums, tokens) by key; kept tokens, and what they count
ShareArrays = tuple[dict[str, tuple[Matrix, int]], list[Matrix], list[Matrix]]
GramArrays = tuple[Matrix, int, str]  # Gram: matrix, tokens, note


@dataclass(frozen=True)
class PassPlan:
    """All that the workers of a pass have in common. parts: (format, context) of each variant. folder: of the pass.

    guided: the seed of the labels, where tokens are weighted; None: they are not. identity: all that their weights
    depend on.
    """

    parts: tuple[tuple[str, Context], ...]
    token_ids: tuple[tuple[int, ...], ...]
    precision: Precision
    folder: Path
    guided: int | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Share:
    """Some of the batches, as if they were all. batches: with rows counted from 0. sequences: in their order. starts:
    of each batch among all rows.
    """

    batches: tuple[Batch, ...]
    sequences: tuple[torch.Tensor, ...]
    starts: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Rows of all its batches."""
        return sum(batch.rows for batch in self.batches)


def deal(token_ids: Sequence[Sequence[int]], device: str) -> list[Share]:
    """The shares of a calibration set, as the pass on one machine with such a device sums them up."""
    sequences = as_sequences(token_ids)
    dealt: dict[int, list[Batch]] = {}
    starts: dict[int, list[int]] = {}
    for number, batch in enumerate(make_batches([len(ids) for ids in sequences], batch_tokens(device))):
        own = dealt.setdefault(share_of(number, device), [])
        starts.setdefault(share_of(number, device), []).append(batch.start)
        start = own[-1].start + own[-1].rows if own else 0
        own.append(Batch(batch.members, batch.length, start))
    return [
        Share(tuple(own), tuple(sequences[member] for batch in own for member in batch.members), tuple(starts[share]))
        for share, own in sorted(dealt.items())
    ]


def share_folder(folder: Path, share: int) -> Path:
    """Where a share's hidden states are."""
    return folder / f"share-{share:05d}"


class PassWorker:
    """The work itself, one call at a time. Raises what the pass on one machine raises."""

    def __init__(self, plan: PassPlan) -> None:
        self._plan, self._context = plan, plan.parts[0][1]
        self._checkpoint, self._device = self._context.checkpoint, self._context.limits.device
        self._runner = BlockRunner(self._checkpoint.config, self._device, plan.precision)
        self._shares = deal(plan.token_ids, self._device)
        self._held: dict[int, tuple[int, HiddenStates]] = {}  # share -> the block whose input they are, the states
        self._embedded: set[int] = set()
        self._loaded: tuple[BlockLayout, dict[str, torch.Tensor]] | None = None
        self._collectors: dict[int, Collector] = {}
        self._events = ListReporter()
        self._states_on_gpu = True

    def take_events(self) -> list[Event]:
        """What was said since the last call."""
        events, self._events.events = self._events.events, []
        return events

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on one."""
        return self._runner.device.type == "cuda"

    def make_room(self) -> None:
        """Out of the GPU's memory: let go of what can be read or made again; hidden states are held elsewhere now."""
        self._states_on_gpu = False
        self._held.clear()
        if self._loaded is not None:
            before, self._loaded = self._loaded[0].index, None
            self._runner.unload(before)
        give_back_gpu()

    def guide(self, share: int) -> WeightTable:
        """Find what each token of a share counts, going on from what another worker left of it."""
        own, plan = self._shares[share], self._plan
        assert plan.guided is not None
        draws = uniform_draws(sum(other.tokens for other in self._shares), plan.guided)
        rows = [draws[start : start + batch.rows] for start, batch in zip(own.starts, own.batches, strict=True)]
        return find_weights(
            self._checkpoint, Text(own.batches, own.sequences, torch.cat(rows)),
            share_folder(plan.folder, share) / GUIDE, plan.identity, device=self._device, precision=plan.precision,
            reporter=self._events,
        )  # fmt: skip

    def forward(
        self, share: int, block: int, saved: SavedStates | None, tables: Sequence[WeightTable] = (), *, record: bool
    ) -> tuple[SavedStates | None, ShareArrays | None]:
        """Take a share through a block: where the next one's input is, and the sums if they are to be recorded.

        saved: the block's input, for a worker that does not hold it; None for the first block. tables: what the tokens
        of each share count, if they are weighted.
        """
        own, states = self._shares[share], self._states(share, block, saved)
        layout, _ = self._load(block)
        last = block == self._runner.blocks - 1
        sums = None
        if record:
            guide = TokenWeights(tables[share], tables).block(block, self._runner.device) if tables else None
            with self._runner.recording(layout, output_needed=not last) as recorder:
                for batch in own.batches:
                    counted = None if guide is None else guide.batch(batch)
                    output = recorder.run(states.read(batch), share, counted)
                    if output is not None and not last:
                        states.write(batch, output)
                sums = _share_arrays(recorder.take(share))
        else:
            for batch in own.batches:
                states.write(batch, self._runner.run(block, states.read(batch)))
        if last:
            return None, sums
        states.advance()
        self._held[share] = (block + 1, states)
        return states.save(), sums

    def complete(self, block: int, shares: Iterable[ShareArrays]) -> dict[str, GramArrays]:
        """The Gram matrices of a block from the sums of all shares, in order."""
        layout = block_layout(self._checkpoint.config, block)
        if layout.experts is not None:
            self._load(block)
        total = ShareSums()
        for arrays in shares:
            total.merge(_share_sums(arrays, self._runner.device if layout.experts else torch.device("cpu")))
        grams = self._runner.complete(layout, total)
        matrices = _to_host({key: gram.matrix for key, gram in grams.items()})
        return {key: (matrices[key], gram.tokens, gram.note) for key, gram in grams.items()}

    def solve(
        self, block: int, part: int, piece: int, grams: dict[str, GramArrays], tables: Sequence[WeightTable] = ()
    ) -> Any:
        """What a variant needs of a piece of a block. grams: of the inputs that the piece reads. tables: as `forward`
        has them.
        """
        layout, weights = self._load(block)
        device = self._runner.device
        matrices = {
            key: Gram(_to_device(matrix, device), tokens, note) for key, (matrix, tokens, note) in grams.items()
        }
        if part not in self._collectors:
            name, context = self._plan.parts[part]
            self._collectors[part] = builders()[name].collector(context, self._events)
        layout = self._collectors[part].pieces(layout)[piece]
        inputs = {linear.tensor: linear.input for linear in layout.linears}
        guide = TokenWeights(tables[0], tables) if tables else None
        outputs = {} if guide is None else guide.outputs(layout)
        ends = guide.vocabulary(self._runner.blocks) if guide is not None and block == self._runner.blocks - 1 else None
        return self._collectors[part].solve(Block(block, layout, weights, matrices, inputs, outputs, ends))

    def _states(self, share: int, block: int, saved: SavedStates | None) -> HiddenStates:
        """The input of a block: held since the last one, made from the tokens, or read from where it was saved."""
        at, states = self._held.pop(share, (-1, None))
        if states is not None and at == block:
            return states
        own = self._shares[share]
        folder = share_folder(self._plan.folder, share)
        folder.mkdir(parents=True, exist_ok=True)
        budget = self._context.limits.memory_budget_bytes
        states = open_states(self._runner, own.tokens, Spill(folder, budget, gpu_bytes=self._gpu_room()))
        if saved is None or share not in self._embedded:
            fill = states if saved is None else None
            embed_all(self._checkpoint, self._runner, list(own.sequences), fill)
            self._embedded.add(share)
        if saved is not None and not states.load(saved):
            raise BuildError(
                f"the hidden states of share {share} before block {block} are damaged or gone",
                hint="is the store on storage that all nodes share? Run the same build again",
            )
        return states

    def _gpu_room(self) -> int:
        """Bytes of the GPU that hidden states may take: what neither the pass nor states that are held there need."""
        if not self.on_gpu or not self._states_on_gpu:
            return 0
        return max(0, free_gpu_bytes(str(self._runner.device)) - self._pass_bytes)

    @cached_property
    def _pass_bytes(self) -> int:
        """What the pass itself takes of the GPU."""
        solvers = [(builders()[name], context.options) for name, context in self._plan.parts]
        return gpu_pass_bytes(self._checkpoint, solvers)

    def _load(self, block: int) -> tuple[BlockLayout, dict[str, torch.Tensor]]:
        """A block's layout and weights, in place to run; it stays until another one is needed."""
        if self._loaded is None or self._loaded[0].index != block:
            if self._loaded is not None:
                before, self._loaded = self._loaded[0].index, None
                self._runner.unload(before)
            layout = block_layout(self._checkpoint.config, block)
            weights = read_block(self._checkpoint, layout, self._runner.device)
            self._runner.load(layout, weights)
            self._loaded = (layout, weights)
        return self._loaded


def _share_arrays(sums: ShareSums) -> ShareArrays:
    matrices = _to_host({key: part.matrix for key, part in sums.sums.items()})
    kept = _to_host(dict(enumerate(states.float() for states in sums.kept)))
    counts = _to_host(dict(enumerate(sums.counts)))
    arrays = {key: (matrices[key], part.tokens) for key, part in sums.sums.items()}
    return arrays, [*kept.values()], [*counts.values()]


def _share_sums(arrays: ShareArrays, device: torch.device) -> ShareSums:
    found = ShareSums()
    matrices, kept, counts = arrays
    found.sums = {
        key: GramAccumulator.of(_to_device(matrix, device), tokens) for key, (matrix, tokens) in matrices.items()
    }
    found.kept = [_to_device(states, device) for states in kept]
    found.counts = [_to_device(each, device) for each in counts]
    return found


def _to_host(tensors: Mapping[Key, torch.Tensor]) -> dict[Key, Matrix]:
    """Tensors as arrays; those of a GPU through pinned memory, which it writes to by itself, all at once."""
    found = {}
    for key, tensor in tensors.items():
        found[key] = tensor
        if tensor.device.type == "cuda":
            found[key] = torch.empty(tensor.shape, dtype=tensor.dtype).pin_memory()
            found[key].copy_(tensor, non_blocking=True)
    for device in {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}:
        torch.cuda.synchronize(device)
    return {key: tensor.numpy() for key, tensor in found.items()}


def _to_device(array: Matrix, device: torch.device) -> torch.Tensor:
    """An array, which may be of another process and not to be written to, as a tensor of its own."""
    if device.type != "cuda":
        return torch.tensor(array, device=device)
    return torch.tensor(array).pin_memory().to(device, non_blocking=True)
