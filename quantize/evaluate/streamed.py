"""A model that does not fit in memory as a Runtime: all windows go through one block of it after the other.

In: a checkpoint, or an artifact in the Hugging Face layout and the checkpoint that it was made from. Out: the same
log-probabilities as transformers gives, computed in float32 by transformers' own layers. Memory holds one block, one
piece of the output head and the hidden states of all windows, and those are in a file where they are many. An
artifact's matrices are the numbers that its codes stand for; norms, biases, embedding and config are its own.
Left to others: whether a model is run so (device.py). It answers nothing: each token would read all weights anew.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantize.calibration.block_reader import TensorSource, read_blocks
from quantize.calibration.block_runner import BlockRunner
from quantize.calibration.hidden_states import (
    Batch,
    FileStates,
    MemoryStates,
    SavedStates,
    ScratchStates,
    States,
    make_batches,
)
from quantize.calibration.output_head import OutputHead
from quantize.calibration.stream import embed_all
from quantize.errors import CheckpointError, UsageError, VerifyError
from quantize.evaluate.engine import STREAMED, streamed_version
from quantize.events import Reporter, progress
from quantize.files.safetensors import TensorInfo
from quantize.formats import find_format
from quantize.model.architecture import block_layouts
from quantize.model.checkpoint import Checkpoint, open_checkpoint, read_json, tensor_table
from quantize.model.layout import BlockLayout
from quantize.numerics.constants import batch_tokens, shares_on
from quantize.runtimes.base import ModelRef, Prompted, block_rows, log_softmax
from quantize.runtimes.devices import DevicePlace
from quantize.system.memory import give_back_freed
from quantize.system.threads import in_turn, split_threads

if TYPE_CHECKING:
    from quantize.formats.format import Product, Reader
    from quantize.runtimes.base import LogProbs

STATE_BYTES = 1 << 30  # of hidden states that are kept in memory; more go to a file
Products = Callable[[str], "Product"]
RIDDEN = "ride.json"  # beside the states that a calibration pass leaves
UNPACKED_AT_ONCE = 2  # matrices: each takes a few copies of itself on the way to float32


class StreamedRuntime:
    """See Runtime. scratch: a folder on a disk, for hidden states beyond `state_bytes`."""

    def __init__(
        self, source: TensorSource, label: str, place: DevicePlace, reporter: Reporter, scratch: Path,
        *, threads: int = 0, state_bytes: int = STATE_BYTES, products: Products | None = None,
        ridden: Path | None = None,
    ) -> None:  # fmt: skip
        """products: see Format. ridden: see open_streamed.

        Raises VerifyError: tensors are missing or do not fit the architecture.
        """
        if threads:
            torch.set_num_threads(threads)
        self.name, self.version, self._products = STREAMED, streamed_version(), products
        self.warnings: tuple[str, ...] = ()
        self._source, self._label, self._reporter = source, label, reporter
        self._scratch, self._state_bytes, self._ridden = scratch, state_bytes, ridden
        with self._told():
            self._runner = BlockRunner(source.config, place.device, "float32", fast=products is None)
            self._head = OutputHead(self._runner, source)
        self.vocabulary = self._head.vocabulary

    def read(self, windows: Sequence[Sequence[int]]) -> Iterator[Iterator[LogProbs]]:
        """See Runtime. The first window comes when all have gone through all blocks."""
        batches, ordered = in_batches(windows, self._runner.device, alone=self._products is not None)
        tokens = sum(batch.rows for batch in batches)
        states = self._after_blocks(tokens) or self._open_states(tokens)
        try:
            if not isinstance(states, FileStates):
                with self._told():
                    embed_all(self._source, self._runner, ordered, states)
                    self._run_blocks(batches, states)
            places = dict(_single(batches))
            for number in range(len(windows)):
                yield self._rows(states.read(places[number])[0])
        finally:
            if isinstance(states, ScratchStates):
                states.close()

    def log_probs(self, window: Sequence[int]) -> Iterator[LogProbs]:
        """See Runtime; it reads all weights for one window."""
        for found in self.read([window]):
            yield from found

    def answer(self, requests: Sequence[Prompted]) -> list[list[int]]:
        """Raises UsageError: it can't."""
        raise UsageError(f"{self._label}: a model that is read block by block answers no prompts")

    def close(self) -> None:
        """See Runtime."""
        del self._runner, self._head
        give_back_freed()

    def _after_blocks(self, tokens: int) -> FileStates | None:
        """What a calibration pass has left of the same windows."""
        if self._ridden is None:
            return None
        states = FileStates(tokens, self._runner.hidden_size, self._runner.device, self._ridden)
        saved = read_saved(self._ridden / RIDDEN)
        return states if saved is not None and saved.block == self._runner.blocks and states.load(saved) else None

    def _open_states(self, tokens: int) -> MemoryStates | ScratchStates:
        hidden, device = self._runner.hidden_size, self._runner.device
        if 4 * tokens * hidden > self._state_bytes:
            return ScratchStates(tokens, hidden, device, self._scratch)
        return MemoryStates(tokens, hidden, device, None, held=device if device.type == "cuda" else "cpu")

    def _run_blocks(self, batches: list[Batch], states: States) -> None:
        """All batches through each block."""
        runner, tokens = self._runner, sum(batch.rows for batch in batches)
        for layout, weights in read_blocks(self._source, list(block_layouts(self._source.config)), runner.device):
            runner.load(layout, weights)
            del weights
            with computing_with(self._products, runner.layer(layout.index), layout):
                run_block(runner, layout.index, batches, states)
            give_back_freed()
            text = f"running {self._label} block by block, tokens x blocks"
            progress(self._reporter, "", text, (layout.index + 1) * tokens, runner.blocks * tokens)

    def _rows(self, states: Tensor) -> Iterator[LogProbs]:
        for piece in torch.split(states, block_rows(self.vocabulary)):
            yield log_softmax(self._head.logits(piece), self._label)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever is wrong with its files, the model does not run."""
        try:
            yield
        except CheckpointError as exc:
            raise VerifyError(f"{self._label}: {exc.message}", hint=exc.hint) from exc


def in_batches(
    windows: Sequence[Sequence[int]], device: torch.device, *, alone: bool = False
) -> tuple[list[Batch], list[Tensor]]:
    """Windows as they go through the blocks, and the token ids of each, in that order. alone: one at a time."""
    sequences = [torch.tensor(ids[:-1], dtype=torch.long) for ids in windows]  # nothing follows the last token
    batches = make_batches([len(ids) for ids in sequences], 1 if alone else batch_tokens(device.type))
    return batches, [sequences[member] for batch in batches for member in batch.members]


def run_block(runner: BlockRunner, index: int, batches: Sequence[Batch], states: States) -> None:
    """All batches through a block that is loaded, which is let go; on a CPU two at once, each with its part of the
    threads, as calibration.
    """

    def run(batch: Batch) -> Tensor:
        return runner.run(index, states.read(batch))

    with split_threads(shares_on(runner.device.type)) as pools:
        tasks = [partial(run, batch) for batch in batches]
        for batch, output in zip(batches, in_turn(tasks, pools), strict=True):
            states.write(batch, output)
    states.advance()
    runner.unload(index)


class ArtifactTensors:
    """An artifact as the full-precision checkpoint that it stands for: a TensorSource with the source's names."""

    def __init__(self, artifact: ModelRef, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError, VerifyError: it can't be read."""
        weights = find_format(artifact.format).weights
        self.folder = artifact.folder
        self.config: Mapping[str, Any] = read_json(artifact.folder / "config.json")
        self._own = tensor_table(artifact.folder)
        self._read: Reader | None = None if weights is None else weights.reader(artifact.path, checkpoint)
        self._linears = {item.tensor for layout in block_layouts(checkpoint.config) for item in layout.linears}
        self.tensors: Mapping[str, TensorInfo] = {
            name: info for name, info in checkpoint.tensors.items() if name in self._own or name in self._linears
        }
        self._turn = threading.BoundedSemaphore(UNPACKED_AT_ONCE)

    def read(self, name: str) -> Tensor:
        """One tensor: float32 of what is packed, else as it is stored. Raises CheckpointError, VerifyError."""
        if name in self._linears and self._read is not None:
            with self._turn:
                found = self._read(name, torch.empty(self.tensors[name].shape, device="meta"))
            if found is not None:
                return found
        if name not in self._own:
            raise CheckpointError(f"there is no tensor {name}")
        return Checkpoint(self.folder, self.config, self._own, {}).read(name)


def _single(batches: Sequence[Batch]) -> Iterator[tuple[int, Batch]]:
    """Each sequence's number, and its rows as a batch of its own."""
    for batch in batches:
        for place, member in enumerate(batch.members):
            yield member, Batch((member,), batch.length, batch.start + place * batch.length)


@contextmanager
def computing_with(products: Products | None, layer: nn.Module, layout: BlockLayout) -> Iterator[None]:
    """Have each linear of a loaded block, but for those of routed experts, multiply as its real runtime does."""
    linears = [item for item in layout.linears if item.expert is None] if products is not None else []
    modules = [layer.get_submodule(layout.module_path(item.tensor).removesuffix(".weight")) for item in linears]
    for module, linear in zip(modules, linears, strict=True):
        assert products is not None
        multiply: Any = products(linear.tensor)
        module.forward = partial(lambda module, multiply, states: multiply(states, module.bias), module, multiply)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def read_saved(path: Path, key: str | None = None) -> SavedStates | None:
    """The record that rider.py keeps of its states; None if there is none, or it has another key."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return SavedStates(**found["states"]) if key in (None, found["key"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def open_streamed(
    model: ModelRef, source: Path, place: DevicePlace, reporter: Reporter, scratch: Path, *, threads: int = 0,
    ridden: Path | None = None,
) -> StreamedRuntime:  # fmt: skip
    """Open a model to be read block by block. source: folder of the checkpoint that it is, or was made from.

    ridden: folder of what rider.py leaves of the windows that are read first; without it they go through the blocks.

    Raises VerifyError: it can't be read. CheckpointError: the source can't be.
    """
    checkpoint = open_checkpoint(source)
    is_source = model.folder == source
    try:
        tensors: TensorSource = checkpoint if is_source else ArtifactTensors(model, checkpoint)
    except CheckpointError as exc:
        raise VerifyError(f"{model.folder.name}: {exc.message}", hint=exc.hint) from exc
    of_format = None if is_source else find_format(model.format).products
    products = of_format(model.path) if of_format is not None else None
    name = model.folder.name
    return StreamedRuntime(
        tensors, name, place, reporter, scratch, threads=threads, products=products, ridden=ridden
    )  # fmt: skip
