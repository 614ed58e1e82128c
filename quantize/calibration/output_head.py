"""What follows the last decoder block: the final norm, the output head and what the model makes of its products.

In: hidden states after the last block, and where the model's tensors are. Out: logits, float32, by the forward function
of transformers' own model, so that caps and scales of logits are its own; the gradient of the model's own loss in the
states. The head's weight stays as it is stored, in mapped pages of its file; a piece of its rows is converted and
multiplied at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantize.calibration.block_reader import TensorSource
from quantize.calibration.block_runner import BlockRunner
from quantize.errors import CheckpointError
from quantize.numerics.constants import LOGIT_BYTES
from quantize.numerics.guidance import loss_gradient

PIECE_BYTES = 64 << 20  # of the head's rows in float32


class OutputHead:
    """The end of a runner's model, with its weights. vocabulary: the rows of the head.

    Raises CheckpointError: a tensor is not there, or does not fit.
    """

    def __init__(self, runner: BlockRunner, source: TensorSource) -> None:
        self._runner = runner
        device, model = runner.device, runner.model
        head, table = (_path_of(model, each()) for each in (model.get_output_embeddings, model.get_input_embeddings))
        on_disk = {path: name for name, path in (*runner.anatomy.entry, *runner.anatomy.leaving)}
        name = _head_name(source, on_disk, head, table, tied=bool(model.config.get_text_config().tie_word_embeddings))
        weight, bias = source.read(name), None
        if f"{head}.bias" in on_disk:
            bias = source.read(_known(source, on_disk[f"{head}.bias"])).to(device).float()
        if weight.dim() != 2 or weight.shape[1] != runner.width:
            raise CheckpointError(f"{name} is {list(weight.shape)}; it must have {runner.width} inputs")
        self.vocabulary = int(weight.shape[0])
        for path, named in on_disk.items():
            if path.rpartition(".")[0] not in (head, table):
                runner.put(path, source.read(_known(source, named)).to(device, torch.float32))
        self._path, self._old = head, model.get_submodule(head)
        self._linear = _PiecewiseLinear(weight, bias, runner.product_type)
        model.set_submodule(head, self._linear)

    def logits(self, states: Tensor) -> Tensor:
        """float32 [rows, vocabulary] of the last block's output [rows, hidden]."""
        logits: Tensor = self._runner.finish(states).logits[0]
        return logits.float()

    def close(self) -> None:
        """Let go of the head's weight."""
        self._runner.model.set_submodule(self._path, self._old)

    def watch(self, see: Callable[[Tensor, Tensor], None]) -> None:
        """Have `see` get, for each piece of a way back, what the head reads [rows, in] and the gradient in its products
        [rows, vocabulary].
        """
        self._linear.see = see

    def back(self, states: Tensor, draws: Tensor) -> Tensor:
        """The gradient in the last block's output [rows, hidden], float32, of the cross-entropy summed over rows whose
        labels are drawn from the model itself. draws: what each is drawn with, [rows] in [0, 1).
        """
        rows = max(1, LOGIT_BYTES // (4 * self.vocabulary))
        parts = zip(torch.split(states, rows), torch.split(draws, rows), strict=True)
        return torch.cat([self._back(*part) for part in parts])

    def _back(self, states: Tensor, draws: Tensor) -> Tensor:
        given = states.detach().clone().requires_grad_()
        logits = self._runner.finish(given, gradient=True).logits[0].float()
        (found,) = torch.autograd.grad(logits, given, loss_gradient(logits.detach(), draws))
        return found


def _path_of(model: nn.Module, wanted: nn.Module | None) -> str:
    return next((path for path, module in model.named_modules() if module is wanted), "")


def _head_name(source: TensorSource, on_disk: Mapping[str, str], head: str, table: str, *, tied: bool) -> str:
    """The head's own weight, or the embedding that it shares."""
    named = f"{head}.weight"
    own = on_disk.get(named, named)
    if tied and named not in source.tensors and own not in source.tensors:
        return _known(source, on_disk.get(f"{table}.weight", own))
    return _known(source, named if named in source.tensors else own)


def _known(source: TensorSource, name: str) -> str:
    if name not in source.tensors:
        raise CheckpointError(f"there is no tensor {name}")
    return name


class _PiecewiseLinear(nn.Module):
    """A linear whose weight [out, in] is converted a piece of its rows at a time: to float32, or for a gradient to
    `product_type`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, product_type: torch.dtype) -> None:
        super().__init__()
        self._stored: tuple[Any, ...] = torch.split(weight, max(1, PIECE_BYTES // (4 * weight.shape[1])))
        self._rows, self._bias, self._type = weight.shape[0], bias, product_type
        self.see: Callable[[Tensor, Tensor], None] | None = None

    def forward(self, states: Tensor) -> Tensor:
        """[..., out] of [..., in], float32."""
        product: Tensor
        if torch.is_grad_enabled() and states.requires_grad:
            product = _Product.apply(states, self)  # type: ignore[no-untyped-call]
        else:
            product = self.product(states, torch.float32)
        return product if self._bias is None else product + self._bias

    def product(self, states: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Without the bias, multiplied in a type; None: that of the pass."""
        dtype, given = dtype or self._type, states.to(dtype or self._type)
        product = torch.empty(*states.shape[:-1], self._rows, device=states.device)
        start = 0
        for piece in self._stored:
            stop = start + len(piece)
            product[..., start:stop] = nn.functional.linear(given, piece.to(states.device).to(dtype))
            start = stop
        return product

    def back(self, gradient: Tensor) -> Tensor:
        """The gradient in the states, float32 [..., in], of that in the product [..., out]."""
        found, start = torch.zeros(()), 0
        for piece in self._stored:
            part = gradient[..., start : start + len(piece)].to(self._type)
            found = found.to(gradient.device) + (part @ piece.to(gradient.device).to(self._type)).float()
            start += len(piece)
        return found


class _Product(torch.autograd.Function):
    """The product of a _PiecewiseLinear, which keeps no copy of the weight for its gradient."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, linear: _PiecewiseLinear) -> Tensor:
        """See _PiecewiseLinear.product."""
        ctx.linear, ctx.states = linear, states.detach()
        return linear.product(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """See _PiecewiseLinear.back."""
        if ctx.linear.see is not None:
            ctx.linear.see(ctx.states, gradients[0])
        return ctx.linear.back(gradients[0]), None
