"""The loop of small operations that rounds to FP4, as plain torch, which TorchScript runs too; see loops.py."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_level(values: Tensor, levels: Tensor, borders: Tensor) -> Tensor:
    """Each value as the nearest of the levels with its sign. levels: rising, from 0. borders: halfway between them."""
    return torch.copysign(levels[torch.bucketize(values.abs(), borders)], values)


def round_group(
    target: Tensor, exact: Tensor, errors: Tensor, steps: Tensor, feedback: Tensor, scale: Tensor, levels: Tensor,
    borders: Tensor,
) -> None:  # fmt: skip
    """Round a group's columns [group, rows] in turn: fills `steps`, in units of the scale [rows], and `errors` (exact -
    rounded).
    """
    earlier = feedback.t().contiguous()
    for column in range(target.shape[0]):
        value = target[column]
        if column > 0:
            value.addmv_(errors[:column].t(), earlier[column, :column])
        step = nearest_level(value / scale, levels, borders)
        steps[column] = step
        errors[column] = exact[column] - step * scale
