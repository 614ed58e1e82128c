"""What follows the last decoder block: the final norm, the output head and what the model makes of its products.

In: hidden states after the last block, and where the model's tensors are. Out: logits, float32, by the forward function
of transformers' own model, so that caps and scales of logits are its own. The head's weight stays as it is stored, in
mapped pages of its file; a piece of its rows is converted and multiplied at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantize.calibration.block_reader import TensorSource
from quantize.calibration.block_runner import BlockRunner
from quantize.errors import CheckpointError

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
        model.set_submodule(head, _PiecewiseLinear(weight, bias))

    def logits(self, states: Tensor) -> Tensor:
        """float32 [rows, vocabulary] of the last block's output [rows, hidden]."""
        logits: Tensor = self._runner.finish(states).logits[0]
        return logits.float()


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
