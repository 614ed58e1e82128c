"""The least memory that a calibration pass takes, from headers: what `--memory-budget` is held against.

In: a checkpoint's shapes, what each solver needs, the threads. Out: bytes of resident memory at the peak of the
process that runs the pass, its hidden states on disk. The shares are those measured on models of 135M and of 1,024- and
2,048-wide blocks (docs/disk.md has the figures); none is of the model's size but what is one block's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from quantize.errors import PlanError
from quantize.model.architecture import anatomy_of, block_layouts
from quantize.model.checkpoint import Checkpoint
from quantize.model.config import number_or
from quantize.model.layout import BlockLayout
from quantize.model.shape import ModelShape
from quantize.numerics.constants import BATCH_TOKENS, GPU_BATCH_TOKENS, GPU_SOLVED_VALUES, LOGIT_BYTES, SHARES
from quantize.system.sizes import mebibytes_text

BASE_BYTES = 420 << 20  # Python, torch and transformers, loaded and warm
TOKEN_BYTES = 1 << 10  # of a tokenizer's tables, for each token of the vocabulary
SOLVER_BYTES = 40 << 20  # what any solver brings along
PART_BYTES = 60 << 20  # what one leaves to the allocator for the next
KEPT_ACTIVATIONS = 20  # the same, of a batch that a gradient goes back through
ACTIVATIONS = 6  # tensors as wide as the widest input, of a batch under way
ROW_COPIES = 6  # of the rows that are solved at a time on a GPU: target, errors, codes, rounded to nearest …
KEPT_BYTES = 8 << 30  # of blocks' inputs on disk for a way back; more are computed again
HEAD_PIECES, HEAD_PIECE_BYTES = 2, 64 << 20  # of the output head, converted
HEAD_GRAMS = 4  # of its input: the sums in doubles, a product, and its doubles
LOGIT_COPIES = 8  # of the logits that are there at once: probabilities, their sums, the gradient …
FLOAT_BYTES = 4


@dataclass(frozen=True)
class BlockMemory:
    """The largest block in float32. weights: bytes of all its tensors. largest: of its largest linear.

    grams: bytes of the Gram matrix of each distinct input, largest first. width: of the widest input, in channels.
    stacked: bytes of the linears that read one input, where they are most.
    """

    weights: int
    largest: int
    grams: tuple[int, ...]
    width: int
    stacked: int


class Solver(Protocol):
    """The part of a builder that matters here."""

    def solver_bytes(self, block: BlockMemory, options: Any, threads: int) -> int:
        """Memory beside a block's weights and statistics."""


def largest_block(checkpoint: Checkpoint) -> BlockMemory:
    """The block whose weights and Gram matrices take most. Raises CheckpointError: the architecture is not known."""
    found = [_block_memory(checkpoint, layout) for layout in block_layouts(checkpoint.config)]
    return max(found, key=lambda item: item.weights + sum(item.grams))


def least_bytes(checkpoint: Checkpoint, solvers: Sequence[int]) -> int:
    """Of the pass, if hidden states go to disk. solvers: what each variant's solve takes, 0 for next to nothing."""
    block = largest_block(checkpoint)
    grams = sum(block.grams)
    base, copying = _beside_blocks(checkpoint)
    working = FLOAT_BYTES * block.width * BATCH_TOKENS * SHARES * ACTIVATIONS
    recording = block.weights // 2 + 2 * grams + working  # a copy in bfloat16, the sums of a round's two shares
    solving = [SOLVER_BYTES + size for size in solvers if size]
    others = PART_BYTES * max(0, len(solving) - 1)
    return base + block.weights + grams + max(recording, copying, max(solving, default=0) + others)


def _beside_blocks(checkpoint: Checkpoint) -> tuple[int, int]:
    """The process with its vocabulary, and what copying the largest tensor outside of the blocks takes."""
    anatomy = anatomy_of(checkpoint.config)
    outside = [info.size_bytes for name, info in checkpoint.tensors.items() if anatomy.block_of(name) is None]
    vocabulary = TOKEN_BYTES * number_or(checkpoint.config, "vocab_size", 0)
    return BASE_BYTES + vocabulary, 2 * max(outside, default=0)  # the pages that are read, and a copy in FP16


def pass_bytes(
    checkpoint: Checkpoint, parts: Sequence[tuple[Solver, Any]], threads: int, *, guided: bool = False
) -> int:
    """As least_bytes, for builders and their options. guided: the model goes forward and back before. Raises
    CheckpointError.
    """
    block = largest_block(checkpoint)
    least = least_bytes(checkpoint, [builder.solver_bytes(block, options, threads) for builder, options in parts])
    return max(least, _guide_bytes(checkpoint, block)) if guided else least


def _guide_bytes(checkpoint: Checkpoint, block: BlockMemory) -> int:
    """Of the way forward and back: a block with what its gradient takes, or the head with the logits of some tokens."""
    base, copying = _beside_blocks(checkpoint)
    working = FLOAT_BYTES * block.width * BATCH_TOKENS * SHARES * KEPT_ACTIVATIONS
    gram = FLOAT_BYTES * ModelShape.from_config(checkpoint.config).hidden_size ** 2
    head = copying + HEAD_PIECES * HEAD_PIECE_BYTES + LOGIT_COPIES * LOGIT_BYTES + HEAD_GRAMS * gram
    return base + max(block.weights + block.weights // 2 + working, head)


def host_bytes(checkpoint: Checkpoint) -> int:
    """Of the memory beside a GPU for a pass on it, without hidden states: a block as it is stored, and the next one."""
    base, copying = _beside_blocks(checkpoint)
    return base + largest_block(checkpoint).weights + copying  # the two blocks are in 16 bits


def gpu_pass_bytes(
    checkpoint: Checkpoint, parts: Sequence[tuple[Solver, Any]], *, guided: bool = False
) -> int:  # fmt: skip
    """Of a GPU's memory for a pass on it, without hidden states and the driver's own. Raises CheckpointError."""
    block = largest_block(checkpoint)
    rows = FLOAT_BYTES * min(GPU_SOLVED_VALUES, block.stacked // FLOAT_BYTES)
    a_tensor = FLOAT_BYTES * block.width * GPU_BATCH_TOKENS
    recording = block.weights // 2 + a_tensor * ACTIVATIONS
    solvers = [builder.solver_bytes(block, options, 1) for builder, options in parts]
    solving = max(solvers, default=0) + ROW_COPIES * rows
    back = block.weights // 2 + a_tensor * KEPT_ACTIVATIONS if guided else 0
    return block.weights + max(sum(block.grams) + max(recording, solving), back)


@dataclass(frozen=True)
class GpuNeed:
    """A pass on a GPU. pass_bytes: what it takes of the card, beside the driver's own. state_bytes: of all its hidden
    states. free_bytes: what the card has left once the driver has its own.
    """

    device: str
    pass_bytes: int
    state_bytes: int
    free_bytes: int

    def states_are(self, host_budget: int | None) -> str:
        """Where the hidden states go. host_budget: bytes of the computer's memory for them, None for any number."""
        if self.state_bytes <= self.free_bytes - self.pass_bytes:
            return "on the GPU"
        return "in memory" if host_budget is None or self.state_bytes <= host_budget else "in files"

    def shortage(self) -> PlanError | None:
        """The refusal of a pass that does not fit even with its hidden states elsewhere; None if it fits."""
        if self.pass_bytes <= self.free_bytes:
            return None
        return PlanError(
            f"the calibration pass takes {mebibytes_text(self.pass_bytes)} of the GPU {self.device}, which has "
            f"{mebibytes_text(self.free_bytes)} free: {self.pass_bytes - self.free_bytes:,} bytes are missing",
            hint="close what else uses the GPU, build fewer variants at once with --only, or use --device cpu",
        )


def state_bytes(config: Mapping[str, Any], tokens: int) -> int:
    """Of the hidden states of so many tokens. Raises CheckpointError."""
    found = anatomy_of(config)
    return FLOAT_BYTES * tokens * ModelShape.from_config(config).hidden_size * math.prod(found.lanes) * found.wide


def kept_every(blocks: int, state_bytes: int) -> int:
    """Of how many blocks one has its input kept until the way back: 1 where all of them take no more than KEPT_BYTES.

    state_bytes: of one block's. Where even the best choice takes more, that is taken: about the root of their number.
    """
    choices = range(1, max(1, math.isqrt(blocks)) + 1)
    fitting = (every for every in choices if kept_inputs(blocks, every) * state_bytes <= KEPT_BYTES)
    return next(fitting, min(choices, key=lambda every: kept_inputs(blocks, every)))


def kept_inputs(blocks: int, every: int) -> int:
    """How many blocks' inputs lie on disk at once at the most, the last block's output among them."""
    return math.ceil(blocks / every) + every


def guide_state_bytes(blocks: int, state_bytes: int) -> int:
    """Of the files of guided statistics before the pass begins: inputs of blocks, and gradients in two."""
    return (kept_inputs(blocks, kept_every(blocks, state_bytes)) + 2) * state_bytes


def token_weights_bytes(config: Mapping[str, Any], tokens: int) -> int:
    """Of the files with what each token counts: a number for each input of a block; in a mixture two numbers and their
    places for each expert that a token chooses. Raises CheckpointError.
    """
    total = 0
    for layout in block_layouts(config):
        total += sum(readers[0].expert is None for readers in layout.inputs.values())
        if layout.experts is not None:
            total += 1 + 4 * number_or(config, "num_experts_per_tok", layout.experts.count)
    return FLOAT_BYTES * tokens * total + _sums_bytes(config)


def _sums_bytes(config: Mapping[str, Any]) -> int:
    """Of sums over tokens beside them: for each output of each linear, about, and for head and embedding."""
    shape = ModelShape.from_config(config)
    outputs = shape.layers * (3 * shape.intermediate_size + 6 * shape.hidden_size)
    return 2 * FLOAT_BYTES * (outputs + shape.hidden_size * shape.hidden_size + 2 * shape.vocab_size)


def memory_short(least: int, budget: int) -> PlanError:
    """The refusal of a pass that can't stay under its budget."""
    return PlanError(
        f"the memory budget is too small: the calibration pass takes at least {mebibytes_text(least)}, the budget is "
        f"{mebibytes_text(budget)}, {least - budget:,} bytes are missing",
        hint="raise --memory-budget, lower --threads, or build fewer of the calibrated variants with --only; text that "
        "the model writes itself (`self`, `self-chat`) holds all of it in float32",
    )


def _block_memory(checkpoint: Checkpoint, layout: BlockLayout) -> BlockMemory:
    shapes = {name: info for name, info in checkpoint.tensors.items() if name.startswith(layout.prefix)}
    linears = {item.tensor: shapes[item.tensor] for item in layout.linears if item.tensor in shapes}
    widths, stacks = [], []
    for readers in layout.inputs.values():
        known = [linears[item.tensor] for item in readers if item.tensor in linears]
        widths += [info.shape[-1] for info in known[:1]]
        stacks.append(FLOAT_BYTES * sum(info.elements for info in known))
    return BlockMemory(
        weights=FLOAT_BYTES * sum(info.elements for info in shapes.values()),
        largest=FLOAT_BYTES * max((info.elements for info in linears.values()), default=0),
        grams=tuple(sorted((FLOAT_BYTES * width * width for width in widths), reverse=True)),
        width=max(widths, default=0),
        stacked=max(stacks, default=0),
    )
