"""One pass over a calibration set, a decoder block at a time: the statistics that every calibrated format needs.

In: a checkpoint (config, lazy tensors) and token ids. Out: an iterator of blocks, each with its weights and a Gram
matrix for every distinct input of its linears. Left to others: solving, folding, writing (numerics, backends).
Blocks see full-precision inputs, so each can be solved on its own; memory holds one block, its Gram matrices and the
hidden states, whatever the depth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from quantize.architecture import BlockLayout, Linear, block_layout
from quantize.block_runner import BlockRunner
from quantize.errors import BuildError, CheckpointError
from quantize.hidden_states import Batch, FileStates, HiddenStates, MemoryStates, make_batches
from quantize.numerics.gptq import estimated_loss
from quantize.numerics.gram import Gram
from quantize.report import Reporter, SilentReporter, progress, warn

Precision = Literal["float32", "bfloat16"]
TOKENS_PER_BATCH = 512  # what fits caches between one operation and the next


class TensorInfo(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""


class TensorSource(Protocol):
    """The part of a checkpoint that the pass needs."""

    @property
    def folder(self) -> Path:
        """Folder with config.json."""

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Every tensor's name."""

    def read(self, name: str) -> Tensor:
        """One tensor, in the type it is stored in."""


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
    inputs: full weight name of each linear -> its input key.
    """

    index: int
    layout: BlockLayout
    weights: dict[str, Tensor]
    grams: dict[str, Gram]
    inputs: dict[str, str]
    _energies: dict[str, float] = field(default_factory=dict, repr=False)

    def share(self, loss: float, linear: Linear) -> float:
        """A squared output error over the calibration tokens as a share of the output's energy tr(W G Wᵀ)."""
        if linear.tensor not in self._energies:
            gram = self.grams[linear.input].matrix
            self._energies[linear.tensor] = estimated_loss(self.weights[linear.tensor], gram)
        energy = self._energies[linear.tensor]
        return float(f"{loss / energy:.6g}") if energy > 0 else 0.0


def stream_blocks(
    checkpoint: TensorSource,
    token_ids: Sequence[Sequence[int] | Tensor],
    *,
    device: str = "cpu",
    precision: Precision = "float32",
    memory_budget_bytes: int | None = None,
    workdir: Path | None = None,
    start_block: int = 0,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    reporter: Reporter | None = None,
) -> Iterator[Block]:
    """Yield each block from `start_block` on, with its weights and Gram matrices.

    Sequences may differ in length; equal ones run together and none is padded. Hidden states stay in memory up to
    `memory_budget_bytes`, else in files under `workdir`; from those a later call with the same tokens resumes at
    `start_block` (or the nearest block before it). Without them, blocks before `start_block` are run again, without
    statistics. Drop what a yielded Block holds before asking for the next one.

    Raises:
        CheckpointError: architecture not in the table, or tensors that don't fit it.
        BuildError: no tokens, no folder to spill to, or the disk failed.
    """
    events = reporter or SilentReporter()
    sequences = [torch.as_tensor(ids, dtype=torch.long).reshape(-1) for ids in token_ids]
    sequences = [ids for ids in sequences if ids.numel()]
    if not sequences:
        raise BuildError("the calibration set has no tokens")
    runner = BlockRunner(checkpoint.folder, dict(checkpoint.config), device, precision)
    batches = make_batches([len(ids) for ids in sequences], tokens_per_batch)
    ordered = [sequences[member] for batch in batches for member in batch.members]
    tokens = sum(len(ids) for ids in ordered)
    states, first = _open_states(runner, ordered, memory_budget_bytes, workdir, start_block, precision)
    _embed(checkpoint, runner, ordered, states if first is None else None)
    total = tokens * runner.blocks
    for index in range(first or 0, runner.blocks):
        layout = block_layout(checkpoint.config, index)
        weights = _read_block(checkpoint, layout, device)
        runner.load(layout, weights)
        last = index == runner.blocks - 1
        if index < start_block:
            for batch in batches:
                states.write(batch, runner.run(index, states.read(batch)))
            grams = None
        else:
            grams = _record(runner, layout, batches, states, last)
        progress(events, "", "calibration pass, tokens x blocks", (index + 1) * tokens, total)
        runner.unload(index)
        if grams is not None:
            _report_notes(events, index, grams)
            inputs = {linear.tensor: linear.input for linear in layout.linears}
            yield Block(index, layout, weights, grams, inputs)
        del weights, grams
        if not last:
            states.advance(index + 1)
    if isinstance(states, FileStates):
        states.remove()


def _open_states(
    runner: BlockRunner,
    sequences: list[Tensor],
    budget: int | None,
    workdir: Path | None,
    start_block: int,
    precision: str,
) -> tuple[HiddenStates, int | None]:
    tokens = sum(len(ids) for ids in sequences)
    size = 4 * tokens * runner.hidden_size
    if budget is None or size <= budget:
        return MemoryStates(tokens, runner.hidden_size, runner.device), None
    if workdir is None:
        raise BuildError(
            f"hidden states need {size} bytes, more than the budget of {budget}", hint="give a folder to spill them to"
        )
    digest = hashlib.sha256(f"{precision} {[len(ids) for ids in sequences]}".encode())
    digest.update(torch.cat(sequences).numpy().tobytes())
    files = FileStates(workdir, digest.hexdigest(), runner.hidden_size, runner.device)
    return files, files.resume(start_block)


def _embed(checkpoint: TensorSource, runner: BlockRunner, sequences: list[Tensor], states: HiddenStates | None) -> None:
    """Write the first block's input; with states None, only learn each length's masks and positions."""
    name = "model.embed_tokens.weight"
    if name not in checkpoint.tensors:
        raise CheckpointError(f"the checkpoint has no tensor {name}")
    start = 0
    for embedded in runner.embed(checkpoint.read(name), sequences):
        if states is not None:
            states.write(Batch((0,), embedded.shape[0], start), embedded)
        start += embedded.shape[0]
    if states is not None:
        states.advance(0)


def _read_block(checkpoint: TensorSource, layout: BlockLayout, device: str) -> dict[str, Tensor]:
    names = sorted(name for name in checkpoint.tensors if name.startswith(layout.prefix))
    if not names:
        raise CheckpointError(f"the checkpoint has no tensors under {layout.prefix}")
    missing = [linear.tensor for linear in layout.linears if linear.tensor not in checkpoint.tensors]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {missing[0]}", hint="its config.json may belong to another model")
    return {name: checkpoint.read(name).to(device, torch.float32) for name in names}


def _record(
    runner: BlockRunner, layout: BlockLayout, batches: list[Batch], states: HiddenStates, last: bool
) -> dict[str, Gram]:
    with runner.recording(layout, output_needed=not last) as recorder:
        for batch in batches:
            output = recorder.run(states.read(batch))
            if output is not None and not last:
                states.write(batch, output)
        return recorder.finish()


def _report_notes(events: Reporter, index: int, grams: dict[str, Gram]) -> None:
    starved = [gram.note for gram in grams.values() if gram.note]
    if starved:
        warn(events, "", f"block {index}: {len(starved) // 2} starved experts; {starved[0]}")
