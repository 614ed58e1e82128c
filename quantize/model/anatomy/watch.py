"""Runs a model and keeps what goes into its blocks; then what goes into and out of each module of a block.

In: a tiny model in float64, token ids. Out: the list of blocks, each block's call, and that they can be run one at a
time: shown by doing it. Left to others: what the linears of a block are (observe), what feeds them (feeds).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import CheckpointError, first_line

SAME = 1e-9  # of the largest value: what rounding in float64 leaves between two ways to the same number


class Unknown(CheckpointError):
    """Why an architecture is not run block by block."""


@dataclass
class BlockCall:
    """What a block was called with, and what it gave. args: without the hidden states."""

    states: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def result(self) -> Tensor:
        """The hidden states that come out."""
        found: Tensor = first(self.output)
        return found


def same(left: Tensor, right: Tensor, tolerance: float = SAME) -> bool:
    """Whether two tensors are the same numbers, but for rounding."""
    if left.shape != right.shape or not torch.isfinite(left).all():
        return False
    return bool((left - right).abs().max() <= tolerance * right.abs().max().clamp_min(1e-30)) if left.numel() else True


def first(output: Any) -> Any:
    """The hidden states of what a block gives."""
    return output[0] if isinstance(output, tuple | list) else output


def outputs_of(output: Any) -> int:
    """How many things a block gives: 0 for a tensor alone, else the length of its tuple."""
    return len(output) if isinstance(output, tuple | list) else 0


def forward(model: Any, ids: Tensor) -> Tensor:
    """Logits [sequences, length, vocabulary] of ids [sequences, length]. Raises Unknown: the model does not run."""
    try:
        output = model(input_ids=ids, **no_cache(model))
    except Exception as exc:  # a tiny model of any class may fail in any way
        raise Unknown(f"a small one does not run: {type(exc).__name__}: {first_line(exc)}") from exc
    logits: Tensor = output.logits if hasattr(output, "logits") else first(output)
    if not bool(torch.isfinite(logits).all()):
        raise Unknown("the logits of a small one are not finite")
    return logits


def no_cache(model: Any) -> dict[str, Any]:
    """The argument that keeps a model from filling a cache, where it has one."""
    named = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in named or "kwargs" in named else {}


def block_path(model: Any, run: Callable[[], object]) -> str:
    """The path of the list of decoder blocks: the outermost whose modules run once each, with the most weights.

    Raises Unknown: there is none, or its blocks run more than once.
    """
    lists = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.ModuleList) and len(each)]
    counts: dict[int, int] = {}

    def count(module: nn.Module, *_: object) -> None:
        counts[id(module)] = counts.get(id(module), 0) + 1

    handles = [child.register_forward_hook(count) for _, each in lists for child in each]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    ran = [(name, each, [counts.get(id(child), 0) for child in each]) for name, each in lists]
    outer = [
        (_weights(each), name, times) for name, each, times in ran
        if any(times) and not any(name.startswith(f"{other}.") and any(found) for other, _, found in ran)
    ]  # fmt: skip
    if not outer:
        raise Unknown("no list of blocks was found in it")
    most, path, times = max(outer, key=lambda item: item[0])
    assert isinstance(path, str)
    if sum(size for size, _, _ in outer) - most > most / 4:
        raise Unknown(f"its blocks lie in several lists: {', '.join(name for _, name, _ in outer)}")
    if max(times) > 1:
        raise Unknown(f"a block of {path} runs {max(times)} times in one pass")
    if min(times) < 1:
        raise Unknown(f"block {times.index(0)} of {path} does not run when the model reads text")
    return path


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)


def watch_blocks(blocks: nn.ModuleList, run: Callable[[], object]) -> list[BlockCall]:
    """Every block's call in one pass over the model. Raises Unknown: one reads no hidden states."""
    calls: list[BlockCall] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        states, args, kwargs = take_states(args, kwargs)
        calls.append(BlockCall(states, args, kwargs, output))

    handles = [block.register_forward_hook(keep, with_kwargs=True) for block in blocks]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def take_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states that a block is called with, and the other arguments. Raises Unknown."""
    if args and isinstance(args[0], Tensor):
        return args[0], args[1:], dict(kwargs)
    if not args and isinstance(kwargs.get("hidden_states"), Tensor):
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        return kwargs["hidden_states"], (), rest
    raise Unknown("a block's first argument is no tensor of hidden states")


class Stop(Exception):
    """Leaves a forward pass whose remainder nobody needs."""


@contextmanager
def replaced(blocks: nn.ModuleList, forward_of: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """While open, the blocks do something else."""
    for number, block in enumerate(blocks):
        block.forward = forward_of(number)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def intercept(blocks: nn.ModuleList, run: Callable[[], object], outputs: int) -> tuple[Tensor, list[Arguments]]:
    """The first block's input, and the other arguments of every block, without running any.

    outputs: what a block gives, 0 for a tensor alone, else a tuple of so many. Raises Unknown: blocks are called in
    another order.
    """
    found: list[Tensor] = []
    arguments: list[Arguments] = []

    def recorder(number: int) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            states, args, kwargs = take_states(args, kwargs)
            if number != len(arguments):
                raise Unknown("its blocks do not run one after the other")
            if not found:
                found.append(states)
            arguments.append((args, kwargs))
            if len(arguments) == len(blocks):
                raise Stop
            return (states, *[None] * (outputs - 1)) if outputs else states

        return record

    try:
        with replaced(blocks, recorder):
            run()
    except Stop:
        pass
    return found[0], arguments


def run_apart(model: Any, blocks: nn.ModuleList, ids: Tensor, calls: list[BlockCall]) -> bool:
    """Whether blocks run one at a time, on what other tokens of the same number gave as arguments, compute the same.

    ids: [2, length]; calls: of the model on the first row. Returns whether both rows can run together as well.
    Raises Unknown: the blocks depend on one another, or on the tokens, in another way than by their hidden states.
    """
    outputs = outputs_of(calls[0].output)

    def arguments_of(rows: Tensor) -> tuple[Tensor, list[Arguments]]:
        try:
            return intercept(blocks, lambda: forward_only(model, rows), outputs)
        except Unknown:
            raise
        except Exception as exc:
            raise Unknown(f"it computes with what its blocks give: {type(exc).__name__}: {first_line(exc)}") from exc

    start, own = arguments_of(ids[:1])
    if start.dim() < 3 or start.shape[:2] != ids[:1].shape:
        shape = " x ".join(map(str, start.shape))
        raise Unknown(f"its blocks read hidden states of another form: {shape} of {ids.shape[1]} tokens")
    if not same(start, calls[0].states):
        raise Unknown("the first block's input is not the same twice")
    if not _ends_at(blocks, start, own, calls[-1].result):
        raise Unknown("a block reads more than the one before it gives: its blocks do not run one at a time")
    second, others = arguments_of(ids[1:])
    if not all(_alike(*pair) for pair in zip(own, others, strict=True)):
        raise Unknown("its blocks read something of each token beside the hidden states")
    expected = torch.cat([calls[-1].result, run_blocks(blocks, second, others)])
    try:
        return same(run_blocks(blocks, torch.cat([start, second]), own), expected)
    except Exception:  # noqa: BLE001 - a block that is given more sequences than it was told may fail in any way
        return False


def _alike(left: Any, right: Any) -> bool:
    """Whether arguments hold the same tensors."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return isinstance(left, Tensor) and isinstance(right, Tensor) and torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_alike(left[key], right[key]) for key in left)
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(_alike(*pair) for pair in zip(left, right, strict=True))
    return True


def forward_only(model: Any, ids: Tensor) -> None:
    """One pass for what hooks see of it."""
    model(input_ids=ids, **no_cache(model))


def run_blocks(blocks: nn.ModuleList, states: Tensor, arguments: list[Arguments]) -> Tensor:
    """States [sequences, length, hidden] through all blocks, one after the other."""
    for block, (args, kwargs) in zip(blocks, arguments, strict=True):
        states = first(block(states, *args, **kwargs))
    return states


def _ends_at(blocks: nn.ModuleList, start: Tensor, arguments: list[Arguments], end: Tensor) -> bool:
    try:
        return same(run_blocks(blocks, start, arguments), end)
    except Exception:  # noqa: BLE001 - a block that lacks what another one leaves may fail in any way
        return False
