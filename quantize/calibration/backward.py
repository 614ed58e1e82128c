"""One decoder block forward and back: the gradient at its input, and how much each token matters to each linear input.

In: a block that is loaded into a BlockRunner, a batch's states before it, the gradient of the loss after it. Out: the
gradient before it, raw weights of tokens by input key, sums of squares of the gradient by linear and output. The
forward pass is transformers' own code once more, under autograd; hooks see the gradients at the outputs of the linears.
Weights of the model get no gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantize.calibration.block_runner import BlockRunner
from quantize.calibration.token_weights import Weighed
from quantize.errors import BuildError
from quantize.model.layout import BlockLayout, Experts
from quantize.numerics.guidance import raw_weights, squares_by_output, sum_of_squares

PLAINLY = "leave `guided` out of the calibration"


class _Squares:
    """Sums of squares of the gradients at the outputs of what reads each input, of one run of a block."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self._tokens, self._device = tokens, device
        self.of_all: dict[str, Tensor] = {}
        self.of_some: dict[str, tuple[Tensor, Tensor]] = {}
        self.of_outputs: dict[str, Tensor] = {}
        self.seen: set[str] = set()

    def every(self, key: str) -> Tensor:
        """Those of an input that each token passes, float32 [tokens], to be added to."""
        if key not in self.of_all:
            self.of_all[key] = torch.zeros(self._tokens, device=self._device)
        return self.of_all[key]

    def add(self, key: str, tensor: str, gradient: Tensor) -> None:
        """Of a linear's outputs [..., out]. tensor: its weight."""
        self._add_outputs(tensor, gradient)
        squares = sum_of_squares(gradient)
        if len(squares) != self._tokens:
            raise BuildError(f"input {key}: {len(squares)} rows for {self._tokens} tokens", hint=PLAINLY)
        self.every(key).add_(squares)

    def add_some(self, key: str, tensor: str, rows: Tensor, gradient: Tensor, shared: str | None) -> None:
        """Of an expert's outputs [rows, out]; shared: the input that all experts read, in whose part they count."""
        self._add_outputs(tensor, gradient)
        squares = sum_of_squares(gradient)
        if shared is not None:
            self.every(shared).index_add_(0, rows, squares)
        before = self.of_some.get(key)
        self.of_some[key] = (rows, squares if before is None else before[1] + squares)

    def _add_outputs(self, tensor: str, gradient: Tensor) -> None:
        sums = squares_by_output(gradient)
        before = self.of_outputs.get(tensor)
        self.of_outputs[tensor] = sums if before is None else before + sums

    def weighed(self, start: int) -> dict[str, Weighed]:
        """Raw weights; start: of this run's tokens among those of the batch."""
        found = {key: Weighed(raw_weights(squares)) for key, squares in self.of_all.items()}
        for key, (rows, squares) in self.of_some.items():
            found[key] = Weighed(raw_weights(squares), (rows + start).to(torch.int32))
        return found


class BlockBackward:
    """Runs a block forward and back over many batches, on several threads at once."""

    def __init__(self, runner: BlockRunner, layout: BlockLayout) -> None:
        self._runner, self._layout = runner, layout
        self._thread = threading.local()

    @contextmanager
    def watching(self) -> Iterator[BlockBackward]:
        """While open, run() sees the gradients at the outputs of the linears."""
        layer = self._runner.layer(self._layout.index)
        layer.requires_grad_(False)
        handles = []
        for key, readers in self._layout.inputs.items():
            for linear in readers:
                if linear.expert is None:
                    path = self._layout.module_path(linear.tensor).removesuffix(".weight")
                    ran = partial(self._ran, key, path, linear.tensor)
                    handles.append(layer.get_submodule(path).register_forward_hook(ran))
        experts = self._layout.experts
        routed: Any = None if experts is None else layer.get_submodule(experts.module)
        if experts is not None:
            routed.watch = partial(self._expert_ran, experts)
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            if routed is not None:
                routed.watch = None

    def run(self, states: Tensor, gradient: Tensor) -> tuple[Tensor, dict[str, Weighed], dict[str, Tensor]]:
        """Of the block's input and the gradient after it, both [sequences, length, hidden]: the gradient before it,
        float32, raw weights of the batch's tokens, and by linear the sums over them of the squared gradient at each
        output, float64 [out].

        Raises BuildError: a linear gets no gradient, or one that is not finite.
        """
        together = self._runner.anatomy.together
        pairs = [(states, gradient)] if together else zip(torch.split(states, 1), torch.split(gradient, 1), strict=True)
        befores, start = [], 0
        found: dict[str, list[Weighed]] = {}
        outputs: dict[str, Tensor] = {}
        for part, after in pairs:
            tokens = part.shape[0] * part.shape[1]
            squares = self._thread.squares = _Squares(tokens, part.device)
            befores.append(self._runner.back(self._layout.index, part, after))
            for key, item in squares.weighed(start).items():
                found.setdefault(key, []).append(item)
            for tensor, sums in squares.of_outputs.items():
                outputs[tensor] = outputs[tensor] + sums if tensor in outputs else sums
            start += tokens
        return torch.cat(befores), {key: self._joined(key, items) for key, items in found.items()}, outputs

    def _joined(self, key: str, items: list[Weighed]) -> Weighed:
        values, rows = torch.cat([item.values for item in items]), [item.rows for item in items]
        if not bool(torch.isfinite(values).all()):
            where = f"block {self._layout.index}, input {key}"
            raise BuildError(f"{where}: the gradient of the loss is not finite", hint=PLAINLY)
        return Weighed(values, torch.cat([each for each in rows if each is not None]) if rows[0] is not None else None)

    def _ran(self, key: str, path: str, tensor: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        squares: _Squares = self._thread.squares
        if path not in squares.seen:
            squares.seen.add(path)
            self._check(output, path)
            squares.every(key)  # which stays 0 where no gradient comes
            _on_gradient(output, partial(squares.add, key, tensor))

    def _expert_ran(self, experts: Experts, expert: int, rows: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> None:
        squares: _Squares = self._thread.squares
        self._check(down, experts.module)
        inner, outer = (name.format(expert=expert) for name in (experts.expert_input, experts.output))
        names = tuple(name.format(expert=expert) for name in (experts.gate, experts.up, experts.down))
        for tensor, projected in zip(names, (gate, up), strict=False):
            _on_gradient(projected, partial(squares.add_some, inner, tensor, rows, shared=experts.input))
        _on_gradient(down, partial(squares.add_some, outer, names[2], rows, shared=None))

    def _check(self, output: Tensor, path: str) -> None:
        if not output.requires_grad:
            raise BuildError(f"block {self._layout.index}: no gradient gets to {path}", hint=PLAINLY)


def _on_gradient(output: Tensor, told: Callable[[Tensor], None]) -> None:
    """Have the gradient in an output told, once it is there."""
    output.register_hook(told)  # type: ignore[no-untyped-call]
