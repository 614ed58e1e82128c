"""What must fit -> the bytes of a file.

In: a FitSpec, the shape of the model, what its file has beside its tensors. Out: a Budget. On a card the weights have
what the safe-upper estimate leaves of the usable bytes, beside KV cache, buffers and the runtime's own
(estimate/vram.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from quantize.errors import UsageError
from quantize.estimate.fit import USABLE_PERCENT, usable_bytes
from quantize.estimate.vram import EstimateSettings, estimate
from quantize.formats.gguf.fit.spec import FitSpec
from quantize.model.shape import ModelShape
from quantize.system.sizes import memory_text


@dataclass(frozen=True)
class Frame:
    """What a file has beside the bytes of its tensors, and what they are of.

    header_bytes: up to the first tensor. elements: values of all tensors. towers_bytes: of the file with towers.
    """

    shape: ModelShape
    header_bytes: int
    elements: int
    towers_bytes: int = 0


@dataclass(frozen=True)
class Budget:
    """file_bytes: what the model file may take. words: where that comes from."""

    file_bytes: int
    words: str


def budget_of(spec: FitSpec, frame: Frame) -> Budget:
    """The bytes of a file. Raises UsageError: the card holds no weights at all, or the context is not the model's."""
    if spec.size is not None:
        return Budget(spec.size, spec.words)
    if spec.bits is not None:
        return Budget(frame.header_bytes + int(spec.bits * frame.elements / 8), spec.words)
    return _on_card(spec, frame)


def _on_card(spec: FitSpec, frame: Frame) -> Budget:
    card, shape = spec.card, frame.shape
    assert card is not None
    if spec.context > shape.max_context:
        raise UsageError(
            f"fit: {spec.context:,} tokens are more than the model's own context of {shape.max_context:,}",
            hint=f"use context: {shape.max_context} or less",
        )
    usable = usable_bytes(card.vram_bytes)
    room = weights_within(spec, frame, usable)
    if room is None:
        beside = upper_bytes(spec, frame, 0)
        raise UsageError(
            f"fit: beside weights it takes up to {memory_text(beside)} of the {memory_text(usable)} usable of "
            f"{spec.words}",
            hint="take a shorter context, fewer sequences, a smaller KV cache (kv: q8_0 or q4_0) or a larger card",
        )
    weights, beside = room, upper_bytes(spec, frame, room) - room
    words = (
        f"{spec.words}: {USABLE_PERCENT} % of {memory_text(card.vram_bytes)} less {memory_text(beside)} for KV cache, "
        f"buffers and what may be more than estimated"
    )
    return Budget(frame.header_bytes + weights, words)


def upper_bytes(spec: FitSpec, frame: Frame, weights_bytes: int) -> int:
    """The safe-upper estimate of so many bytes of weights on a card."""
    settings = EstimateSettings("llama.cpp", spec.kv)
    found = estimate(
        frame.shape, weights_bytes + frame.towers_bytes, settings=settings, context=spec.context,
        concurrency=spec.concurrency,
    )  # fmt: skip
    return found.upper_bytes


def weights_within(spec: FitSpec, frame: Frame, usable: int) -> int | None:
    """The most bytes of weights whose safe-upper estimate is within what is usable; None where nothing is left."""
    low, high = 0, usable
    if upper_bytes(spec, frame, low) > usable:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if upper_bytes(spec, frame, middle) <= usable else (low, middle - 1)
    return low or None


def too_small(spec: FitSpec, frame: Frame, budget: Budget, least_bytes: int) -> UsageError:
    """The refusal of a budget below the smallest file, with the least that would fit."""
    weights = least_bytes - frame.header_bytes
    if spec.size is not None:
        hint = f"the least that would fit: size: {least_bytes}"
    elif spec.bits is not None:
        hint = f"the least that would fit: bits: {_rounded_up(8 * weights / frame.elements)}"
    else:
        needed = -(-upper_bytes(spec, frame, weights) * 100 // USABLE_PERCENT)
        hint = (
            f"the least that would fit: a card of {memory_text(needed)}; or take a shorter context, fewer sequences or "
            f"a smaller KV cache"
        )
    return UsageError(
        f"fit: the smallest file takes {least_bytes:,} bytes, the budget is {budget.file_bytes:,} ({budget.words})",
        hint=hint,
    )


def _rounded_up(bits: float) -> float:
    """To a hundredth."""
    return -(-bits * 100 // 1) / 100
