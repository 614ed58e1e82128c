"""What the tensors of a block are called on disk: transformers renames and fuses some when it loads a model.

In: a tiny model, the path of its blocks. Out: the names by which transformers saves each tensor of a block, told by
their values. Left to others: whether a checkpoint really has them (checkpoint, block_reader).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantize.errors import first_line
from quantize.model.anatomy.observe import DOWN, FUSED, Mixture
from quantize.model.anatomy.watch import Unknown

EXPERT = "{expert}"


@dataclass(frozen=True)
class BlockNames:
    """A block's tensors on disk. prefix: starts each name. of: name inside the block as a module has it -> on disk.

    experts: names of gate, up and down, with {expert}. joined: name as a module has it -> tensors on disk, inside of
    the block, that are its rows.
    """

    prefix: str
    of: Mapping[str, str]
    experts: tuple[str, str, str] | None
    joined: Mapping[str, tuple[str, ...]]


def saved(model: Any) -> dict[str, Tensor]:
    """What a checkpoint of the model has, by name. Raises Unknown: transformers does not say."""
    from transformers.core_model_loading import revert_weight_conversion

    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    state = {name: each for name, each in model.state_dict().items() if name not in tied}
    try:
        return dict(revert_weight_conversion(model, state))
    except Exception as exc:  # conversions run code of their own for every kind of model
        raise Unknown(f"how it is saved is not known: {type(exc).__name__}: {first_line(exc)}") from exc


def block_names(
    model: Any, on_disk: Mapping[str, Tensor], path: str, index: int, mixture: Mixture | None
) -> BlockNames:
    """How block `index` is saved. Raises Unknown: otherwise than tensor by tensor, or expert by expert."""
    inside = f"{path}.{index}."
    state = {name.removeprefix(inside): each for name, each in model.state_dict().items() if name.startswith(inside)}
    fused = {f"{mixture.path}.{leaf}" for leaf in (FUSED, DOWN)} if mixture else set()
    by_value: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
    for name, tensor in on_disk.items():
        by_value.setdefault(tuple(tensor.shape), []).append((name, tensor))
    found = {name: _named(by_value, tensor, inside + name) for name, tensor in state.items() if name not in fused}
    names = {name: each for name, each in found.items() if each is not None}
    prefix = _prefix(list(names.values()), index)
    left = {name: each for name, each in on_disk.items() if name.startswith(prefix) and name not in names.values()}
    joined = {}
    for name in [name for name, each in found.items() if each is None]:
        parts = _parts(state[name], left)
        if not parts:
            raise Unknown(f"{inside}{name} is saved in another arrangement")
        joined[name] = tuple(each.removeprefix(prefix) for each in parts)
    experts = None
    if mixture is not None:
        experts = tuple(_expert_names(by_value, mixture, prefix))
    short = {name: each.removeprefix(prefix) for name, each in names.items()}
    return BlockNames(prefix, short, experts, joined)  # type: ignore[arg-type]


def _parts(tensor: Tensor, left: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are its rows, in order; none if there are not such."""
    parts: list[str] = []
    start, rows = 0, len(tensor) if tensor.dim() else 0
    while start < rows:
        fits = [
            name for name, each in left.items()
            if each.dim() == tensor.dim() and name not in parts and torch.equal(each, tensor[start : start + len(each)])
        ]  # fmt: skip
        if not fits:
            return []
        parts.append(fits[0])
        start += len(left[fits[0]])
    return parts


def disk_names(model: Any, on_disk: Mapping[str, Tensor], path: str) -> Iterator[tuple[str, str]]:
    """(Name in the model, name on disk) of each tensor outside of the blocks that is saved as it is."""
    by_value: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
    for name, tensor in on_disk.items():
        by_value.setdefault(tuple(tensor.shape), []).append((name, tensor))
    for name, tensor in model.state_dict().items():
        if not name.startswith(f"{path}."):
            found = _named(by_value, tensor, name)
            if found is not None:
                yield name, found


def _named(by_value: Mapping[tuple[int, ...], list[tuple[str, Tensor]]], tensor: Tensor, wanted: str) -> str | None:
    alike = [name for name, each in by_value.get(tuple(tensor.shape), []) if torch.equal(each, tensor)]
    return wanted if wanted in alike else next(iter(alike), None)


def _prefix(names: list[str], index: int) -> str:
    starts = {name.partition(f".{index}.")[0] for name in names if f".{index}." in name}
    if len(starts) != 1:
        raise Unknown(f"the tensors of a block are saved under {len(starts)} names")
    return f"{starts.pop()}.{index}."


def _expert_names(
    by_value: Mapping[tuple[int, ...], list[tuple[str, Tensor]]], mixture: Mixture, prefix: str
) -> Iterator[str]:
    fused, down = getattr(mixture.module, FUSED), getattr(mixture.module, DOWN)
    inner = down.shape[2]
    for parts in (fused[:, :inner], fused[:, inner:], down):
        patterns = set()
        for expert, part in enumerate(parts):
            name = _named(by_value, part, "")
            if name is None:
                raise Unknown("its experts are saved fused, and no format here writes them so")
            inside = name.removeprefix(prefix)
            patterns.add(f".{inside}".replace(f".{expert}.", f".{EXPERT}.", 1)[1:])
        if len(patterns) != 1 or EXPERT not in next(iter(patterns)):
            raise Unknown("its experts are saved under names without a number")
        yield patterns.pop()
