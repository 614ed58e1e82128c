"""GPTQ's column loop and the clip search as one kernel each, on GPUs where Triton is; elsewhere the plain path runs.

In: the tensors of the plain functions (loops), which are the reference. Out: the same, from a launch where the
plain path has hundreds. A kernel is used once it has given the plain path's codes on this very device; if Triton can't
be imported, compiles nothing here, or gives other codes, `trouble` says so and the plain path runs: on a GPU the form
of it with the fewest launches (few_launches).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantize.numerics import few_launches, loops

PLAIN = "plain"
_GRID = (1.1, 1.0, 0.9, 0.75, 0.6)  # of a trial


@dataclass(frozen=True)
class Kernels:
    """Kernels in the place of loops.round_block, loops.symmetric and loops.asymmetric. name: with its version."""

    name: str
    round_block: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
    symmetric: Callable[[Tensor, Tensor, int, list[float]], Tensor]
    asymmetric: Callable[[Tensor, Tensor, int, float, list[float]], tuple[Tensor, Tensor]]


WITHOUT_TRITON = Kernels(PLAIN, few_launches.round_block, few_launches.symmetric, loops.asymmetric)


def kernels_for(tensor: Tensor) -> Kernels | None:
    """What runs in the place of loops where this tensor is; None on a CPU, which runs them as they are."""
    return _settled(tensor.device)[0] or WITHOUT_TRITON if tensor.is_cuda else None


def trouble(device: torch.device) -> str | None:
    """Why a GPU runs the plain path; None where it does not, and on a CPU."""
    return _settled(device)[1] if device.type == "cuda" else None


def kernels_name(device: torch.device) -> str:
    """What solves on a device: bits may depend on it."""
    found = _settled(device)[0] if device.type == "cuda" else None
    return PLAIN if found is None else found.name


def _settled(device: torch.device) -> tuple[Kernels | None, str | None]:
    """For a GPU by its number, or for the current one."""
    return settled(device if device.index is not None else torch.device("cuda", torch.cuda.current_device()))


@cache
def settled(device: torch.device) -> tuple[Kernels | None, str | None]:
    """The kernels for a GPU, once they have been held against the plain path there; else None, and why."""
    try:
        found: Kernels = importlib.import_module("quantize.numerics.triton_kernels").KERNELS
    except ImportError as exc:
        return None, f"Triton is not there ({exc})"
    try:
        wrong = _differences(found, device)
    except Exception as exc:  # noqa: BLE001 (a compiler, a driver, a language of its own: whatever it is, there is the plain path)
        lines = str(exc).strip().splitlines() or [type(exc).__name__]
        return None, f"{found.name} does not run here ({lines[0]})"
    return (None, f"{found.name} gives other {wrong} than the plain path") if wrong else (found, None)


def _differences(found: Kernels, device: torch.device) -> str:
    """What kernels give otherwise than the plain path on random values; nothing if they agree."""
    made = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made).to(device)

    values, weights = drawn(64, 96), drawn(64).square()
    arguments: Any
    arguments = values, weights, 4, [*_GRID]
    if not _alike(found.symmetric(*arguments), loops.symmetric(*arguments)):
        return "symmetric scales"
    arguments = values, weights, 4, 0.0, [*_GRID]
    pairs = zip(found.asymmetric(*arguments), loops.asymmetric(*arguments), strict=True)
    if not all(_alike(one, two) for one, two in pairs):
        return "asymmetric scales"
    feedback = torch.triu(drawn(64, 64) / 8, 1)
    low, high = torch.full((96,), -8.0, device=device), torch.full((96,), 7.0, device=device)
    steps = [drawn(64, 96) * 4]
    steps.append(steps[0].clone())
    exact = steps[0].clone()
    for round_block, target in zip((found.round_block, loops.round_block), steps, strict=True):
        round_block(target, exact, torch.empty_like(exact), feedback, low, high)
    return "" if _alike(*steps) else "codes"


def _alike(one: Tensor, two: Tensor) -> bool:
    """Equal but for a few near ties, which sums in another order decide otherwise."""
    return bool((one == two).float().mean() > 0.98)
