"""What was found in a tiny block, in the measures of the real one.

In: a tiny block and the real one without weights, what feeds the tiny one's inputs, names on disk. Out: a
Template, with names inside of the block and rows of the real weights. What can't be carried over for sure is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from quantize.model.anatomy.feeds import Feed, NormFeed, RowsFeed
from quantize.model.anatomy.found import Template
from quantize.model.anatomy.names import BlockNames
from quantize.model.anatomy.observe import FUSED, Input, Sight
from quantize.model.anatomy.watch import Unknown
from quantize.model.layout import Experts, FoldGroup, Linear, NormSource, RowsSource

EXPERT_INPUT, EXPERT_OUTPUT = "expert_{expert}", "expert_{expert}_output"


def template(
    tiny: nn.Module, real: nn.Module, sight: Sight, feeds: Sequence[Feed | None], expert_rows: bool, names: BlockNames
) -> Template:
    """What is known of one kind of block.

    feeds: of each input of `sight`. expert_rows: an expert's up projection takes the scales of what its down reads.

    Raises Unknown: the real block is of another form.
    """
    keys = _keys(sight)
    groups: list[FoldGroup] = []
    for item, feed, key in zip(sight.inputs, feeds, keys, strict=True):
        several = [path for path in item.readers if f"{path}.weight" not in names.of]
        if several:
            raise Unknown(f"{several[0]} is several linears on disk")
        kinds = {path: type(tiny.get_submodule(path)) for path in item.readers}
        linears = [
            Linear(names.of[f"{path}.weight"], path, key, kind="" if kind is nn.Linear else kind.__name__)
            for path, kind in kinds.items()
        ]
        source = None if feed is None else _source(feed, item, tiny, real, names)
        passengers = tuple(names.of[name] for name in _ordered(item, sight))
        groups.append(FoldGroup(key, tuple(linears), source, passengers))
    renames = tuple((disk, module) for module, disk in sorted(names.of.items()) if module != disk)
    kept = tuple(
        (disk, reason) for name, reason in sight.kept.items()
        for disk in names.joined.get(name, (names.of.get(name, name),))
    )  # fmt: skip
    joined = tuple(sorted(names.joined.items()))
    if sight.mixture is None:
        return Template(tuple(groups), None, 0, renames, kept, joined)
    experts, inner = _experts(real, sight, keys, names)
    return Template(tuple(groups), experts, inner if expert_rows else 0, renames, kept, joined)


def _ordered(item: Input, sight: Sight) -> list[str]:
    """The router first, then what else is kept and reads the input."""
    router = f"{sight.mixture.router}.weight" if sight.mixture is not None else ""
    return sorted(item.passengers, key=lambda name: name != router)


def _experts(real: nn.Module, sight: Sight, keys: list[str], names: BlockNames) -> tuple[Experts, int]:
    """The routed experts, and the rows of an up projection."""
    assert sight.mixture is not None
    assert names.experts is not None
    fused: Any = getattr(real.get_submodule(sight.mixture.path), FUSED)
    shared = next(key for item, key in zip(sight.inputs, keys, strict=True) if item.mixture)
    router = names.of.get(f"{sight.mixture.router}.weight", "") if sight.mixture.router else ""
    gate, up, down = names.experts
    found = Experts(
        sight.mixture.path, int(fused.shape[0]), gate, up, down, router, shared, EXPERT_INPUT, EXPERT_OUTPUT
    )
    return found, int(fused.shape[1]) // 2


def _source(
    feed: Feed, item: Input, tiny: nn.Module, real: nn.Module, names: BlockNames
) -> NormSource | RowsSource | None:
    if isinstance(feed, NormFeed):
        return NormSource(names.of[feed.parameter], feed.offset)
    width = _width(item, real)
    weight: Any = real.get_submodule(feed.linear).weight
    small: Any = tiny.get_submodule(feed.linear).weight
    rows, few, length = int(weight.shape[0]), int(small.shape[0]), feed.stop - feed.start
    if length == few:
        start, stop = 0, rows
    else:
        if feed.repeats * rows * length != width * few:  # the share of the rows is not the same in the real block
            return None
        stop = width // feed.repeats
        start = feed.start * stop // length
        if start * length != feed.start * stop or (few - feed.start) * stop != (rows - start) * length:
            return None
        stop += start
    repeats, rest = divmod(width, stop - start)
    if rest or (repeats == 1) != (feed.repeats == 1):
        return None
    if repeats == 1:
        return RowsSource(names.of[f"{feed.linear}.weight"], start, stop)
    head_dim = _head_dim(feed, tiny, real)
    if head_dim is None or (stop - start) % head_dim:
        return None
    return RowsSource(names.of[f"{feed.linear}.weight"], start, stop, head_dim, repeats)


def _width(item: Input, real: nn.Module) -> int:
    weight: Any = real.get_submodule(item.readers[0]).weight
    return int(weight.shape[1])


def _head_dim(feed: RowsFeed, tiny: nn.Module, real: nn.Module) -> int | None:
    """The width of a head, which the module around the linear, or its config, has under some name in both."""
    path = feed.linear.rpartition(".")[0]
    if feed.head_dim == feed.stop - feed.start:  # one key-value head
        weight: Any = real.get_submodule(feed.linear).weight
        small: Any = tiny.get_submodule(feed.linear).weight
        return int(weight.shape[0]) * feed.head_dim // int(small.shape[0])
    owners = (tiny.get_submodule(path), real.get_submodule(path))
    places: list[tuple[Any, Any]] = [owners, tuple(getattr(each, "config", None) for each in owners)]  # type: ignore[list-item]
    for small_owner, owner in places:
        named = [
            name for name in _head_names(small_owner)
            if getattr(small_owner, name, None) == feed.head_dim and isinstance(getattr(owner, name, None), int)
        ]  # fmt: skip
        if named:
            return int(getattr(owner, named[0]))
    return None


def _head_names(owner: Any) -> list[str]:
    """Attributes that are numbers, those that are called so first."""
    numbers = [name for name, value in vars(owner).items() if isinstance(value, int)]
    names = [name for name in numbers if "head" in name and "num" not in name]
    return sorted(names, key=lambda name: (name not in ("head_dim", "v_head_dim"), name))


def _keys(sight: Sight) -> list[str]:
    """A name for each input: of the part of the block that reads it, and `_output` for what its last linear reads."""
    keys: list[str] = []
    for item in sight.inputs:
        path = item.readers[0] if item.readers else sight.mixture.path  # type: ignore[union-attr]
        parts = path.split(".")
        top = _part(parts[0]) if len(parts) > 1 else parts[0]
        names = [top, f"{top}_output", f"{top}_{parts[-1]}", path]
        if len(parts) > 2 and "expert" in parts[-2] and top in keys:
            names.insert(1, f"{parts[-2]}_output")
        keys.append(next(name for name in names if name not in keys))
    return keys


def _part(name: str) -> str:
    if "att" in name:
        return "attention"
    return "mlp" if any(word in name for word in ("mlp", "ffn", "feed_forward", "moe")) else name


def check_parameters(tiny: nn.Module, real: nn.Module) -> None:
    """Raises Unknown: the two blocks do not have the same parameters."""
    ours, theirs = dict(tiny.named_parameters()), dict(real.named_parameters())
    if set(ours) != set(theirs):
        other = sorted(set(ours) ^ set(theirs))[0]
        raise Unknown(f"a small block and a real one differ in {other}")
