"""Shapes: what a value may be that fits a schema, once references and combinations are resolved; and what fits two.

In: what single schemas say. Out: Shapes. Parts within a shape are Nodes, not taken apart yet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

from quantize.runtimes.llama_cpp.schema.keywords import TYPES
from quantize.runtimes.llama_cpp.schema.numbers import Bounds
from quantize.runtimes.llama_cpp.schema.refused import Path, SchemaRefused

FREE = Bounds()
ALL_TYPES = frozenset(TYPES)  # an `integer` is in them beside `number`: numbers are the others, here


@dataclass(frozen=True)
class Located:
    """A schema and where it is; `schema` is an object, or False, which nothing fits."""

    schema: Any
    path: Path


Node = tuple[Located, ...]
ANYTHING: Node = ()


@dataclass(frozen=True)
class Texts:
    """What a string must be."""

    least: int = 0
    most: int | None = None
    patterns: tuple[tuple[str, Path], ...] = ()
    formats: tuple[tuple[str, Path], ...] = ()


@dataclass(frozen=True)
class Lists:
    """What an array must be. items: of those after the first; None is not said."""

    first: tuple[Node, ...] = ()
    items: Node | None = None
    least: int = 0
    most: int | None = None

    def at(self, index: int) -> Node:
        """Of one place."""
        return self.first[index] if index < len(self.first) else self.items or ANYTHING


@dataclass(frozen=True)
class Maps:
    """What an object must be. others: of names that are not in `named` and of no pattern; None is not said."""

    named: Mapping[str, Node] = field(default_factory=dict)
    patterns: tuple[tuple[str, Node, Path], ...] = ()
    others: Node | None = None
    required: tuple[str, ...] = ()
    names: Node | None = None
    least: int = 0
    most: int | None = None
    path: Path = ()

    def at(self, name: str) -> Node:
        """Of one name."""
        if name in self.named:
            return self.named[name]
        found = tuple(item for pattern, node, path in self.patterns if found_in(pattern, name, path) for item in node)
        return found if self.matches(name) else self.others or ANYTHING

    @property
    def written(self) -> list[str]:
        """Names that are told, in the order in which they are written."""
        return list(dict.fromkeys((*self.named, *self.required)))

    @property
    def is_open(self) -> bool:
        """Whether names are written that are not told: where it is said, or nothing is said of any name."""
        if self.others is None:
            return not self.written and not self.patterns
        return not any(item.schema is False for item in self.others)

    def matches(self, name: str) -> bool:
        """Whether a name is of a pattern."""
        return any(found_in(pattern, name, path) for pattern, _, path in self.patterns)

    def writes(self, name: str) -> bool:
        """Whether a name may be written."""
        return name in self.written or self.is_open or self.matches(name)


@dataclass(frozen=True)
class ValueShape:
    """One way to fit a schema. values: the only ones; None is any. step: what a number is a multiple of."""

    types: frozenset[str] = ALL_TYPES
    values: tuple[Any, ...] | None = None
    texts: Texts = Texts()
    bounds: Bounds = FREE
    steps: tuple[tuple[Fraction, Path], ...] = ()
    lists: Lists = Lists()
    maps: Maps = Maps()

    @cached_property
    def known(self) -> frozenset[Any] | None:
        """The values, to look them up."""
        return None if self.values is None else frozenset(map(frozen, self.values))


def node(schema: Any, path: Path) -> Node:
    """A schema as a node."""
    return ANYTHING if schema is True else (Located(schema, path),)


def merged(one: ValueShape, two: ValueShape) -> ValueShape | None:
    """What fits both; None: nothing."""
    types = one.types & two.types
    if one.values is not None and two.values is not None:
        values: tuple[Any, ...] | None = same_values(one.values, two.values)
    else:
        values = two.values if one.values is None else one.values
    if not types or values == ():
        return None
    return ValueShape(
        types, values, _merged_texts(one.texts, two.texts), one.bounds.within(two.bounds),
        tuple(dict.fromkeys((*one.steps, *two.steps))), _merged_lists(one.lists, two.lists),
        _merged_maps(one.maps, two.maps),
    )  # fmt: skip


def _merged_texts(one: Texts, two: Texts) -> Texts:
    patterns, formats = dict((*two.patterns, *one.patterns)), dict((*two.formats, *one.formats))
    most = _least(one.most, two.most)
    return Texts(max(one.least, two.least), most, tuple(patterns.items()), tuple(formats.items()))


def _merged_lists(one: Lists, two: Lists) -> Lists:
    length = max(len(one.first), len(two.first))
    items = None if one.items is None and two.items is None else (*(one.items or ()), *(two.items or ()))
    first = tuple((*one.at(at), *two.at(at)) for at in range(length))
    return Lists(first, items, max(one.least, two.least), _least(one.most, two.most))


def _merged_maps(one: Maps, two: Maps) -> Maps:
    if one == Maps() or two == Maps():
        return one if two == Maps() else two
    if (one.patterns and (two.patterns or two.others is not None)) or (two.patterns and one.others is not None):
        path = (one if one.patterns else two).patterns[0][2]
        raise SchemaRefused(path, "can't be held together with names of another schema that holds too")
    named = {name: (*one.at(name), *two.at(name)) for name in dict.fromkeys((*one.named, *two.named))}
    others = None if one.others is None and two.others is None else (*(one.others or ()), *(two.others or ()))
    names = None if one.names is None and two.names is None else (*(one.names or ()), *(two.names or ()))
    return Maps(
        named, (*one.patterns, *two.patterns), others, tuple(dict.fromkeys((*one.required, *two.required))), names,
        max(one.least, two.least), _least(one.most, two.most), one.path,
    )  # fmt: skip


def _least(one: int | None, two: int | None) -> int | None:
    return two if one is None else one if two is None else min(one, two)


def same_values(first: Iterable[Any], second: Iterable[Any]) -> tuple[Any, ...]:
    """Values that are in both, by JSON's equality: 1 is 1.0, and true is not 1."""
    known = {frozen(value) for value in second}
    return tuple(value for value in first if frozen(value) in known)


def frozen(value: Any) -> Any:
    """A value that hashes and compares as JSON's do."""
    if isinstance(value, dict):
        return ("object", frozenset((name, frozen(item)) for name, item in value.items()))
    if isinstance(value, list):
        return ("array", tuple(frozen(item) for item in value))
    return (type(value).__name__ if isinstance(value, bool | str | None) else "number", value)


def found_in(pattern: str, name: str, path: Path) -> bool:
    try:
        return re.search(pattern, name) is not None
    except (re.error, RecursionError, OverflowError) as exc:
        raise SchemaRefused(path, "the pattern can't be read") from exc
