"""What follows the last decoder block: the final norm, the output head and what the model makes of its products.

In: hidden states after the last block, and where the model's tensors are. Out: logits, float32, by the forward function
of transformers' own model, so that caps and scales of logits are its own. The head's weight stays as it is stored, in
mapped pages of its file; a piece of its rows is converted and multiplied at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantize.calibration.block_reader import TensorSource
from quantize.calibration.block_runner import BlockRunner
from quantize.errors import CheckpointError

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm."
PIECE_BYTES = 64 << 20  # of the head's rows in float32


class OutputHead:
    """The end of a runner's model, with its weights. vocabulary: the rows of the head.

    Raises CheckpointError: a tensor is not there, or does not fit.
    """

    def __init__(self, runner: BlockRunner, source: TensorSource) -> None:
        self._model, self._device = runner.model, runner.device
        name = _head_name(source, tied=bool(self._model.config.tie_word_embeddings))
        weight = source.read(name)
        bias = source.read("lm_head.bias") if "lm_head.bias" in source.tensors else None
        if weight.dim() != 2 or weight.shape[1] != runner.hidden_size:
            raise CheckpointError(f"{name} is {list(weight.shape)}; it must have {runner.hidden_size} inputs")
        self.vocabulary = int(weight.shape[0])
        self._model.lm_head = _PiecewiseLinear(weight, None if bias is None else bias.to(self._device).float())
        norm = {
            name.removeprefix(NORM): source.read(name).to(self._device, torch.float32)
            for name in source.tensors if name.startswith(NORM)
        }  # fmt: skip
        try:
            self._model.model.norm.load_state_dict(norm, strict=True, assign=True)
        except RuntimeError as exc:
            raise CheckpointError(f"the final norm: tensors don't fit the architecture: {exc}") from exc

    def logits(self, states: Tensor) -> Tensor:
        """float32 [rows, vocabulary] of the last block's output [rows, hidden]."""
        layers = self._model.model.layers
        for layer in layers:
            layer.forward = lambda *_args, **_kwargs: states[None]
        start = torch.zeros(1, 1, states.shape[1], device=self._device)  # what the layers would have read
        try:
            with torch.no_grad():
                output = self._model(inputs_embeds=start, use_cache=False)
        finally:
            for layer in layers:
                del layer.forward
        logits: Tensor = output.logits[0]
        return logits.float()


def _head_name(source: TensorSource, *, tied: bool) -> str:
    """The head's own weight, or the embedding that it shares."""
    found = next((name for name in (HEAD, EMBEDDING if tied else HEAD) if name in source.tensors), None)
    if found is None:
        raise CheckpointError(f"there is no tensor {HEAD}")
    return found


class _PiecewiseLinear(nn.Module):
    """A linear whose weight [out, in] is converted to float32 a piece of its rows at a time."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._stored: tuple[Any, ...] = torch.split(weight, max(1, PIECE_BYTES // (4 * weight.shape[1])))
        self._rows, self._bias = weight.shape[0], bias

    def forward(self, states: Tensor) -> Tensor:
        """[..., out] of [..., in], float32."""
        product = torch.empty(*states.shape[:-1], self._rows, device=states.device)
        start = 0
        for piece in self._stored:
            stop = start + len(piece)
            product[..., start:stop] = nn.functional.linear(states, piece.to(states.device).float())
            start = stop
        return product if self._bias is None else product.add_(self._bias)
