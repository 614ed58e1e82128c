"""How far a model's activations reach: whether the 16 bits that an artifact is computed in can be FP16.

In: a checkpoint. Out: the same, marked where they come near FP16's end: the largest absolute value that its modules
read or give for some lines of prose, block by block in float32, and that its float32 weights have. FP16 ends at 65,504:
beyond it a model of BF16 (Gemma 3) gives NaN. What formats store then is theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from quantize.calibration.block_reader import read_blocks
from quantize.calibration.block_runner import BlockRunner
from quantize.calibration.text import load_tokenizer
from quantize.errors import QuantizeError, first_line
from quantize.events import Reporter, note, progress, status, warn
from quantize.model.architecture import block_layouts
from quantize.model.checkpoint import Checkpoint
from quantize.model.config import first_number, text_part
from quantize.model.source import PinnedSource, checkpoint_key
from quantize.runtimes.token_lines import token_lines
from quantize.store.manifest import tool_versions
from quantize.system.cache import Cache

TOKENS = 96  # the largest values are at the first tokens of a text, and at its marks
LINES = slice(100, 160)  # of prose
PIECE_ELEMENTS = 1 << 24
HALF_MOST = 65_504  # the largest number of FP16
ROOM = 2  # other text reaches further; SmolLM2, which runs in FP16, has a third of its range
VERSION = 1  # of how it is looked at
TOOLS = ("torch", "transformers")
FAILURES = (QuantizeError, RuntimeError, ValueError, TypeError, KeyError, AttributeError)


def widened(checkpoint: Checkpoint, source: PinnedSource, cache: Cache, reporter: Reporter, device: str) -> Checkpoint:
    """The checkpoint, `wide` where its activations come near FP16's end; said. One in BF16 is not asked.

    Found out once for a source, which the cache keeps. Call it in a worker.
    """
    if checkpoint.dtype == "BF16":
        return checkpoint
    versions = "|".join(f"{name}={version}" for name, version in tool_versions(TOOLS).items() if name in TOOLS)
    key = f"reach:{VERSION}:{checkpoint_key(source)}:{versions}"
    try:
        most = cache.fact(key, lambda: largest_activation(reporter, checkpoint, device))
    except FAILURES as exc:
        warn(reporter, "", f"whether FP16 holds its activations is not known: {first_line(exc)}")
        return checkpoint
    if most * ROOM <= HALF_MOST:
        return checkpoint
    text = f"activations of the source reach {most:,.0f}, and FP16 ends at {HALF_MOST:,}"
    note(reporter, "", f"{text}: what is not quantized is stored and computed in BF16")
    return replace(checkpoint, wide=True)


def largest_activation(reporter: Reporter, checkpoint: Checkpoint, device: str) -> float:
    """The largest absolute value; infinite where something is not finite.

    Raises CheckpointError: its blocks can't be run one at a time, or its tokenizer does not load.
    """
    status(reporter, "", "looking how far the source's activations reach")
    runner = BlockRunner(checkpoint.config, device, "float32")
    most = max((_largest_weight(checkpoint, name) for name in _outside(checkpoint)), default=0.0)

    def see(value: Tensor) -> None:
        nonlocal most
        found = float(value.detach().abs().amax())
        most = max(most, found) if math.isfinite(found) else math.inf

    (states,) = (state[None] for state in runner.embed(checkpoint.read, [_tokens(checkpoint)]))
    see(states)
    layouts = list(block_layouts(checkpoint.config))
    for layout, weights in read_blocks(checkpoint, layouts, runner.device):
        runner.load(layout, weights)
        with runner.watching(layout.index, see):
            states = runner.run(layout.index, states)
        see(states)
        runner.unload(layout.index)
        progress(reporter, "", "looking how far activations reach, blocks", layout.index + 1, len(layouts))
    return most


def _outside(checkpoint: Checkpoint) -> Iterator[str]:
    """Weights that FP16 may be too narrow for by themselves."""
    return (name for name, info in checkpoint.tensors.items() if info.dtype == "F32")


def _largest_weight(checkpoint: Checkpoint, name: str) -> float:
    pieces = torch.split(checkpoint.read(name).reshape(-1), PIECE_ELEMENTS)
    return max((float(piece.abs().amax()) for piece in pieces if piece.numel()), default=0.0)


def _tokens(checkpoint: Checkpoint) -> Tensor:
    """Token ids of prose, int64 [length], begun as the tokenizer begins a sequence."""
    tokenizer = load_tokenizer(checkpoint.folder)
    limit = first_number(text_part(checkpoint.config), ("max_position_embeddings",)) or TOKENS
    ids = tokenizer("\n".join(token_lines()[LINES]))["input_ids"][: min(TOKENS, limit)]
    return torch.tensor(ids, dtype=torch.long)
