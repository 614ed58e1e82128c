"""Puts channel scales into a block: columns times s, and 1/s into the norm or the linear rows that feed them.

In: a block's layout, its float32 weights, and a scale for each fold group. Out: weights of a block that computes the
same function, and the scales that it really has once norms are rounded to the type they are stored in.
Left to others: choosing the scales (numerics.awq).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.errors import BuildError
from quantize.model.layout import BlockLayout, FoldGroup, NormSource, RowsSource


@dataclass(frozen=True)
class Folded:
    """A block after folding. weights: full name -> float32, changed ones new, the others those given.

    changed: names of tensors kept in high precision that are no longer as in the checkpoint (norms, routers, biases).
    scales: fold group's name -> the scales [in] that its columns were multiplied by.
    """

    weights: dict[str, Tensor]
    changed: frozenset[str]
    scales: dict[str, Tensor]


def fold_block(
    layout: BlockLayout, weights: Mapping[str, Tensor], scales: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
) -> Folded:
    """Fold each group's scales [in]; groups without an entry, or without a source, stay as they are.

    dtypes: the type that each norm is stored in. A norm is rounded to it first, and the columns are then multiplied by
    what the rounded norm really divides by, so storing it loses nothing.

    Raises:
        BuildError: scales that are not positive and finite, or not shared as grouped-query attention needs.
    """
    result, changed, used = dict(weights), set[str](), dict[str, Tensor]()
    linears = {linear.tensor for linear in layout.linears}
    for group in layout.groups:
        if group.name not in scales or group.source is None:
            continue
        asked = scales[group.name]
        if not bool((torch.isfinite(asked) & (asked > 0)).all()):
            raise BuildError(f"{layout.prefix}{group.name}: channel scales must be positive and finite")
        if isinstance(group.source, NormSource):
            used[group.name] = _fold_norm(group.source, result, asked, dtypes)
            changed.add(group.source.tensor)
        else:
            used[group.name] = _fold_rows(group.source, result, asked)
        changed |= {_bias(group.source.tensor)} & set(result)
        _scale_columns(group, result, used[group.name])
        changed |= set(group.passengers) - linears
    return Folded(result, frozenset(changed), used)


def _fold_norm(
    source: NormSource, weights: dict[str, Tensor], scales: Tensor, dtypes: Mapping[str, torch.dtype]
) -> Tensor:
    old = weights[source.tensor]
    gain = old + source.offset
    stored = (gain / scales - source.offset).to(dtypes.get(source.tensor, old.dtype)).to(old.dtype)
    new_gain = stored + source.offset
    alone = (scales == 1) | ((new_gain == 0) & (gain != 0))  # nothing to do, or it would be rounded away
    stored = torch.where(alone, old, stored)
    new_gain = torch.where(alone, gain, new_gain)
    weights[source.tensor] = stored
    used = torch.where(gain == 0, torch.ones_like(gain), gain / new_gain)
    bias = _bias(source.tensor)
    if bias in weights:
        weights[bias] = weights[bias] / used
    return used


def _fold_rows(source: RowsSource, weights: dict[str, Tensor], scales: Tensor) -> Tensor:
    runs = scales.view(-1, source.repeats, source.head_dim)
    shared = runs[:, :1].expand_as(runs)
    if not torch.equal(runs, shared):
        raise BuildError(f"{source.tensor}: query heads of one key-value head must share their scales")
    divisor = runs[:, 0].reshape(-1)
    for name in (source.tensor, _bias(source.tensor)):
        if name in weights:
            changed = weights[name].clone()
            rows = changed[source.start : source.stop]
            rows /= divisor if rows.dim() == 1 else divisor[:, None]
            weights[name] = changed
    return scales


def _scale_columns(group: FoldGroup, weights: dict[str, Tensor], scales: Tensor) -> None:
    for name in (*(linear.tensor for linear in group.linears), *group.passengers):
        weights[name] = weights[name] * scales


def _bias(tensor: str) -> str:
    """Of a linear or a norm, by the name of its weight."""
    return f"{tensor.rpartition('.')[0]}.bias"
