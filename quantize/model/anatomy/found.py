"""What is found out of an architecture, as data: what the cache keeps, and block layouts are made of.

In: JSON data, or the pieces. Out: an Anatomy, whose `layout` of a block has the real model's names and rows.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from quantize.model.layout import BlockLayout, Experts, FoldGroup, Linear, NormSource, RowsSource


@dataclass(frozen=True)
class Template:
    """A kind of block, with names inside of it. groups: without those of routed experts.

    experts: what routed experts there are. expert_rows: of each expert's up projection, those that can take the scales
    of what its down projection reads; 0 where that was not proved.
    """

    groups: tuple[FoldGroup, ...]
    experts: Experts | None = None
    expert_rows: int = 0
    renames: tuple[tuple[str, str], ...] = ()
    kept: tuple[tuple[str, str], ...] = ()
    joined: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def layout(self, index: int, prefix: str) -> BlockLayout:
        """The layout of one block, whose tensors' names start with `prefix`."""
        experts = None if self.experts is None else _named_experts(self.experts, prefix)
        groups = tuple(_named_group(group, prefix) for group in self.groups)
        if experts is not None:
            groups = _with_experts(groups, experts, prefix, self.expert_rows)
        kept = tuple((prefix + name, reason) for name, reason in self.kept)
        return BlockLayout(index, prefix, groups, experts, self.renames, kept, self.joined)

    @property
    def folds(self) -> tuple[int, int]:
        """How many groups of inputs have a fold that was proved, and how many there are; experts count as one."""
        folded = sum(group.source is not None for group in self.groups) + (self.expert_rows > 0)
        return folded, len(self.groups) + (self.experts is not None)


@dataclass(frozen=True)
class Anatomy:
    """An architecture. blocks: the path of the list of blocks in transformers' model. kinds: of each block.

    prefix: of a block's tensors on disk, with {index}. attention: the kernel of transformers that is right for it.
    takes_kernels: whether it computes the same with another one that does the same, under a name that it does not know.
    together: whether sequences of one length can run at once. templates: a layout of each kind, with {index}.
    outputs: what a block gives, 0 for a tensor alone, else a tuple of so many. lanes: how many hidden states a token
    has, () for one; wide: how many times the model's width each is. entry, leaving: (name on disk, path) of the
    parameters that are needed before and after the blocks. towers: paths of the outermost modules that text does not
    pass, such as towers for images. module: where the class is.
    refusal: why blocks can't be run one at a time; "" where they can. no_gradient: why a gradient does not get through
    them; "" where it does. seconds: that finding it out took.
    """

    architecture: str
    blocks: str = ""
    prefix: str = ""
    attention: str = ""
    takes_kernels: bool = False
    together: bool = True
    outputs: int = 0
    lanes: tuple[int, ...] = ()
    wide: int = 1
    kinds: tuple[int, ...] = ()
    templates: tuple[Template, ...] = ()
    entry: tuple[tuple[str, str], ...] = ()
    leaving: tuple[tuple[str, str], ...] = ()
    module: str = ""
    refusal: str = ""
    no_gradient: str = ""
    seconds: float = 0.0
    towers: tuple[str, ...] = ()

    def layout(self, index: int) -> BlockLayout:
        """The layout of one block."""
        return self.templates[self.kinds[index]].layout(index, self.prefix.format(index=index))

    def block_of(self, tensor: str) -> int | None:
        """The block that a tensor on disk belongs to, None outside of the blocks."""
        start = self.prefix.partition("{index}")[0]
        number, dot, _ = tensor.removeprefix(start).partition(".")
        return int(number) if tensor.startswith(start) and dot and number.isdecimal() else None

    @property
    def is_of_transformers(self) -> bool:
        """Whether its class is one of transformers' own, or was not found at all."""
        return not self.module or self.module.startswith("transformers.")

    @property
    def folds(self) -> tuple[int, int]:
        """How many groups of inputs have a fold that was proved, and how many there are, over the kinds of blocks."""
        pairs = [template.folds for template in self.templates]
        return sum(folded for folded, _ in pairs), sum(groups for _, groups in pairs)

    def to_data(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Anatomy:
        """Of `to_data`."""
        templates = tuple(_template(item) for item in data["templates"])
        pairs = {key: tuple((left, right) for left, right in data[key]) for key in ("entry", "leaving")}
        numbers = {key: tuple(data[key]) for key in ("kinds", "lanes", "towers")}
        return cls(**{**data, **pairs, **numbers, "templates": templates})


def _template(data: Mapping[str, Any]) -> Template:
    groups = tuple(
        FoldGroup(
            item["name"], tuple(Linear(**each) for each in item["linears"]), _source(item["source"]),
            tuple(item["passengers"]),
        )
        for item in data["groups"]
    )  # fmt: skip
    experts = Experts(**data["experts"]) if data["experts"] else None
    renames, kept = (tuple((left, right) for left, right in data[key]) for key in ("renames", "kept"))
    joined = tuple((path, tuple(names)) for path, names in data["joined"])
    return Template(groups, experts, data["expert_rows"], renames, kept, joined)


def _source(data: Mapping[str, Any] | None) -> NormSource | RowsSource | None:
    if data is None:
        return None
    return NormSource(**data) if "offset" in data else RowsSource(**data)


def _named_group(group: FoldGroup, prefix: str) -> FoldGroup:
    source = None if group.source is None else replace(group.source, tensor=prefix + group.source.tensor)
    linears = tuple(replace(each, tensor=prefix + each.tensor) for each in group.linears)
    return FoldGroup(group.name, linears, source, tuple(prefix + name for name in group.passengers))


def _named_experts(experts: Experts, prefix: str) -> Experts:
    names = {key: prefix + getattr(experts, key) for key in ("gate", "up", "down")}
    return replace(experts, **names, router=prefix + experts.router if experts.router else "")


def _with_experts(groups: tuple[FoldGroup, ...], experts: Experts, prefix: str, rows: int) -> tuple[FoldGroup, ...]:
    """The groups of a block with those of its routed experts: each reads its share of one input."""
    readers: list[Linear] = []
    outputs: list[FoldGroup] = []
    for expert in range(experts.count):
        key, output = (name.format(expert=expert) for name in (experts.expert_input, experts.output))
        gate, up, down = (name.format(expert=expert) for name in (experts.gate, experts.up, experts.down))
        readers += [_expert_linear(prefix, name, key, expert) for name in (gate, up)]
        source = RowsSource(up, 0, rows) if rows else None
        outputs.append(FoldGroup(output, (_expert_linear(prefix, down, output, expert),), source))
    shared = [
        replace(group, linears=(*group.linears, *readers)) if group.name == experts.input else group for group in groups
    ]
    return (*shared, *outputs)


def _expert_linear(prefix: str, tensor: str, key: str, expert: int) -> Linear:
    return Linear(tensor, tensor.removeprefix(prefix).removesuffix(".weight"), key, expert)
