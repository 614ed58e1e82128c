"""Whether a gradient gets through a block, to every linear in it: what guided statistics need.

In: a tiny block in float64 and what it was called with. Out: why it does not; "" where it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import first_line
from quantize.model.anatomy.watch import BlockCall, first


def no_gradient(block: nn.Module, call: BlockCall, linears: Sequence[str]) -> str:
    """Run a block forward and back. linears: paths of those that can be quantized."""
    outputs: dict[str, Tensor] = {}

    def keep(path: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        outputs.setdefault(path, output)

    handles = [block.get_submodule(path).register_forward_hook(partial(keep, path)) for path in linears]
    wanted = [parameter for parameter in block.parameters() if parameter.requires_grad]
    block.requires_grad_(False)
    try:
        with torch.enable_grad():
            before = call.states.detach().clone().requires_grad_()
            after: Tensor = first(block(before.clone(), *call.args, **call.kwargs))
            inside = [output for output in outputs.values() if output.requires_grad]
            found = torch.autograd.grad(after.square().sum(), [before, *inside], allow_unused=True)
    except Exception as exc:  # noqa: BLE001 - what a block raises that was never trained so is anything
        return f"it does not run under autograd: {type(exc).__name__}: {first_line(exc)}"
    finally:
        for handle in handles:
            handle.remove()
        for parameter in wanted:
            parameter.requires_grad_()
    reached = {id(output) for output, gradient in zip(inside, found[1:], strict=True) if gradient is not None}
    tokens = call.states.shape[0] * call.states.shape[1]
    for path, output in outputs.items():
        if id(output) not in reached:
            return f"no gradient gets to {path}"
        if output[..., 0].numel() != tokens:
            return f"{path} reads {output[..., 0].numel()} rows of {tokens} tokens"
    return "" if found[0] is not None else "no gradient gets through a block"
