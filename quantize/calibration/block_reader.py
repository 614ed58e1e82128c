"""A decoder block's weights, from the checkpoint onto the device.

In: a checkpoint, block layouts one after the other. Out: float32 tensors by full name. On a GPU the next block is read
from disk while this one is run and solved: it lies in pinned memory in the type that it is stored in, is copied as it
is, and becomes float32 there. On a CPU nothing is read ahead: memory holds one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quantize.errors import CheckpointError
from quantize.model.layout import BlockLayout
from quantize.system.threads import on_threads, threads_on


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


def read_blocks(
    checkpoint: TensorSource, layouts: Sequence[BlockLayout], device: torch.device
) -> Iterator[tuple[BlockLayout, dict[str, Tensor]]]:
    """Each block's weights in float32, by full name. Let go of one before asking for the next.

    Raises CheckpointError: some are not there.
    """
    if device.type != "cuda":
        yield from ((layout, read_block(checkpoint, layout, device)) for layout in layouts)
        return
    with ThreadPoolExecutor(1) as ahead:
        reading = [ahead.submit(_read_pinned, checkpoint, layout) for layout in layouts[:1]]
        try:
            for number, layout in enumerate(layouts):
                stored = reading.pop().result()
                reading += [ahead.submit(_read_pinned, checkpoint, each) for each in layouts[number + 1 : number + 2]]
                weights = {name: stored.pop(name).to(device, non_blocking=True).float() for name in sorted(stored)}
                yield layout, weights
                del weights
        finally:
            ahead.shutdown(cancel_futures=True)


def read_block(checkpoint: TensorSource, layout: BlockLayout, device: torch.device) -> dict[str, Tensor]:
    """One block's weights in float32, by full name. Raises CheckpointError: some are not there."""
    if device.type == "cuda":
        return {name: tensor.to(device).float() for name, tensor in _read_pinned(checkpoint, layout).items()}
    names = _names(checkpoint, layout)
    tasks = [partial(_read_float32, checkpoint, name) for name in names]
    return dict(zip(names, on_threads(tasks, threads_on(device)), strict=True))


def _read_float32(checkpoint: TensorSource, name: str) -> Tensor:
    return checkpoint.read(name).float()


def _read_pinned(checkpoint: TensorSource, layout: BlockLayout) -> dict[str, Tensor]:
    """A block as it is stored, where a GPU copies from without waiting."""
    return {name: checkpoint.read(name).pin_memory() for name in _names(checkpoint, layout)}


def _names(checkpoint: TensorSource, layout: BlockLayout) -> list[str]:
    names = sorted(name for name in checkpoint.tensors if name.startswith(layout.prefix))
    if not names:
        raise CheckpointError(f"the checkpoint has no tensors under {layout.prefix}")
    missing = [linear.tensor for linear in layout.linears if linear.tensor not in checkpoint.tensors]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {missing[0]}", hint="its config.json may belong to another model")
    return names
