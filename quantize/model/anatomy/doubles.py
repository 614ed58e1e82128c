"""Runs a model's code in float64, that it writes float32 into or not: what is proved to nine digits needs as many.

In: a context. Out: in it, whatever asks for float32 gets float64, and new tensors are float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Doubles(TorchFunctionMode):
    """Norms and softmax of most models convert to float32, which would hide what a fold changes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return torch.Tensor.double(*args)
        swapped = tuple(torch.float64 if item is torch.float32 else item for item in args)
        named = {key: torch.float64 if item is torch.float32 else item for key, item in (kwargs or {}).items()}
        return func(*swapped, **named)


@contextmanager
def doubles() -> Iterator[None]:
    """Float64 for all that is computed inside; nothing is differentiated, and the random state is put back."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _Doubles():
            yield
    finally:
        torch.set_default_dtype(before)
