"""A schema taken apart: references followed, allOf, anyOf and oneOf merged, into shapes without them.

In: the schema. Out: for any part of it the Shapes that a value may have, one of which it must fit. Parts within a shape
stay Nodes, several schemas that all hold, and are taken apart when they are asked for: so a schema may refer to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any
from urllib.parse import unquote

from quantize.runtimes.llama_cpp.schema.keywords import TYPES, check, is_schema
from quantize.runtimes.llama_cpp.schema.numbers import Bounds
from quantize.runtimes.llama_cpp.schema.refused import Path, SchemaRefused
from quantize.runtimes.llama_cpp.schema.shapes import (
    Lists,
    Located,
    Maps,
    Node,
    Texts,
    ValueShape,
    merged,
    node,
    same_values,
)

MAX_SHAPES = 2000


class SchemaReader:
    """Takes one schema apart."""

    def __init__(self, root: Any, never_both: Callable[[SchemaReader, ValueShape, ValueShape], bool]) -> None:
        """never_both: whether nothing that is written to fit the first shape fits the second.

        Raises SchemaRefused: it is no schema.
        """
        if not is_schema(root):
            raise SchemaRefused((), "must be an object")
        self._root = root
        self._never_both = partial(never_both, self)
        self._anchors: dict[str, Located] | None = None
        self._shapes: dict[tuple[int, ...], list[ValueShape]] = {}

    def root(self) -> Node:
        """The whole schema."""
        return node(self._root, ())

    def shapes(self, wanted: Node) -> list[ValueShape]:
        """The shapes of a node; none where nothing can fit it. Raises SchemaRefused."""
        key = tuple(id(item.schema) for item in wanted)
        found = self._shapes.get(key)
        if found is None:
            found = [ValueShape()]
            for item in wanted:
                found = _both(found, self._of_schema(item, ()))
            self._shapes[key] = found
        return found

    def key(self, wanted: Node) -> tuple[int, ...]:
        """The same for nodes of the same schemas: what makes them the same rule."""
        unique = {id(item.schema): item for item in wanted}
        passed: set[int] = set()
        while len(unique) == 1:
            (only,) = unique.values()
            is_reference = isinstance(only.schema, dict) and only.schema.keys() - {"title", "description"} == {"$ref"}
            if not is_reference or id(only.schema) in passed:
                break
            passed.add(id(only.schema))
            check(only.schema, only.path, root=False)
            target = self._target(only)
            unique = {id(target.schema): target}
        return tuple(unique)

    def _of_schema(self, item: Located, above: tuple[int, ...]) -> list[ValueShape]:
        """above: schemas that led here without a value in between; to meet one again is to go in a circle."""
        schema, path = item.schema, item.path
        if schema is True:
            return [ValueShape()]
        if schema is False:
            return []
        if id(schema) in above:
            raise SchemaRefused(path, "refers to itself without end")
        check(schema, path, root=schema is self._root)
        above = (*above, id(schema))
        found = [_own(schema, path)]
        if "$ref" in schema:
            found = _both(found, self._of_schema(self._target(item), above))
        for index, part in enumerate(schema.get("allOf", ())):
            found = _both(found, self._of_schema(Located(part, (*path, "allOf", str(index))), above))
        for word in ("anyOf", "oneOf"):
            if word in schema:
                choices = [
                    self._of_schema(Located(part, (*path, word, str(index))), above)
                    for index, part in enumerate(schema[word])
                ]
                if word == "oneOf":
                    self._check_apart([_both(found, choice) for choice in choices], (*path, word))
                found = _both(found, [shape for choice in choices for shape in choice])
        return [_closed(shape, schema, path) for shape in found]

    def _check_apart(self, choices: list[list[ValueShape]], path: Path) -> None:
        for one, first in enumerate(choices):
            for two, second in enumerate(choices):
                if one != two and not all(self._never_both(a, b) for a in first for b in second):
                    why = f"can't be held: what fits choice {one} may fit choice {two} too; use anyOf"
                    raise SchemaRefused(path, why)

    def _target(self, item: Located) -> Located:
        ref, path = item.schema["$ref"], (*item.path, "$ref")
        name = unquote(ref[1:])
        if name and not name.startswith("/"):
            if self._anchors is None:
                self._anchors = dict(_anchors(self._root, ()))
            if name not in self._anchors:
                raise SchemaRefused(path, "refers to an anchor that is not there")
            return self._anchors[name]
        found, steps = self._root, tuple(step.replace("~1", "/").replace("~0", "~") for step in name.split("/")[1:])
        for step in steps:
            if isinstance(found, list) and step.isdecimal() and int(step) < len(found):
                found = found[int(step)]
            elif isinstance(found, dict) and step in found:
                found = found[step]
            else:
                raise SchemaRefused(path, "refers to what is not there")
        if not is_schema(found):
            raise SchemaRefused(path, "refers to what is no schema")
        return Located(found, steps)


def _anchors(schema: Any, path: Path) -> Iterable[tuple[str, Located]]:
    if isinstance(schema, dict):
        for word in ("$anchor", "$dynamicAnchor"):
            if isinstance(schema.get(word), str):
                yield schema[word], Located(schema, path)
        for name, value in schema.items():
            if name not in ("enum", "const", "default", "examples"):
                yield from _anchors(value, (*path, name))
    elif isinstance(schema, list):
        for index, value in enumerate(schema):
            yield from _anchors(value, (*path, str(index)))


def _own(schema: Mapping[str, Any], path: Path) -> ValueShape:
    """What a schema object says by itself."""
    shape = ValueShape(_types(schema), _values(schema), _texts(schema, path), _bounds(schema), _steps(schema, path))
    if any(word in schema for word in ("items", "prefixItems", "minItems", "maxItems")):
        shape = replace(shape, lists=_lists(schema, path))
    return replace(shape, maps=_maps(schema, path)) if _MAP_WORDS & schema.keys() else shape


_MAP_WORDS = frozenset({"properties", "patternProperties", "additionalProperties", "required", "propertyNames",
                        "minProperties", "maxProperties"})  # fmt: skip


def _types(schema: Mapping[str, Any]) -> frozenset[str]:
    given = schema.get("type", TYPES)
    names = {given} if isinstance(given, str) else set(given)
    return frozenset(names | {"integer"} if "number" in names else names)


def _values(schema: Mapping[str, Any]) -> tuple[Any, ...] | None:
    found = tuple(schema["enum"]) if "enum" in schema else None
    if "const" in schema:
        const = (schema["const"],)
        return const if found is None else same_values(found, const)
    return found


def _texts(schema: Mapping[str, Any], path: Path) -> Texts:
    pattern = ((schema["pattern"], (*path, "pattern")),) if "pattern" in schema else ()
    named = ((schema["format"], (*path, "format")),) if "format" in schema else ()
    return Texts(_count(schema, "minLength") or 0, _count(schema, "maxLength"), pattern, named)


def _bounds(schema: Mapping[str, Any]) -> Bounds:
    found = Bounds()
    for word, low, is_open in (
        ("minimum", True, False), ("exclusiveMinimum", True, True),
        ("maximum", False, False), ("exclusiveMaximum", False, True),
    ):  # fmt: skip
        if word in schema:
            end = Fraction(str(schema[word]))
            found = found.within(Bounds(low=end, low_open=is_open) if low else Bounds(high=end, high_open=is_open))
    return found


def _steps(schema: Mapping[str, Any], path: Path) -> tuple[tuple[Fraction, Path], ...]:
    return ((Fraction(str(schema["multipleOf"])), (*path, "multipleOf")),) if "multipleOf" in schema else ()


def _lists(schema: Mapping[str, Any], path: Path) -> Lists:
    first = tuple(node(part, (*path, "prefixItems", str(at))) for at, part in enumerate(schema.get("prefixItems", ())))
    items = node(schema["items"], (*path, "items")) if "items" in schema else None
    return Lists(first, items, _count(schema, "minItems") or 0, _count(schema, "maxItems"))


def _maps(schema: Mapping[str, Any], path: Path) -> Maps:
    patterns = tuple(
        (pattern, node(part, (*path, "patternProperties", pattern)), (*path, "patternProperties", pattern))
        for pattern, part in schema.get("patternProperties", {}).items()
    )
    word = "additionalProperties"
    maps = Maps(
        {}, patterns, node(schema[word], (*path, word)) if word in schema else None,
        tuple(dict.fromkeys(schema.get("required", ()))),
        node(schema["propertyNames"], (*path, "propertyNames")) if "propertyNames" in schema else None,
        _count(schema, "minProperties") or 0, _count(schema, "maxProperties"), path,
    )  # fmt: skip
    named = {}
    for name, part in schema.get("properties", {}).items():
        also = maps.at(name) if maps.matches(name) else ()
        named[name] = (*node(part, (*path, "properties", name)), *also)
    return replace(maps, named=named)


def _count(schema: Mapping[str, Any], word: str) -> int | None:
    return int(schema[word]) if word in schema else None


def _closed(shape: ValueShape, schema: Mapping[str, Any], path: Path) -> ValueShape:
    """What a schema says of all that nothing else in it has looked at."""
    for word in ("unevaluatedItems", "unevaluatedProperties"):
        rest = node(schema[word], (*path, word)) if word in schema else None
        if rest is not None and word == "unevaluatedItems" and shape.lists.items is None:
            shape = replace(shape, lists=replace(shape.lists, items=rest))
        if rest is not None and word == "unevaluatedProperties" and shape.maps.others is None:
            shape = replace(shape, maps=replace(shape.maps, others=rest))
    return shape


def _both(first: list[ValueShape], second: list[ValueShape]) -> list[ValueShape]:
    """What fits one of the first and one of the second."""
    if len(first) * len(second) > MAX_SHAPES:
        raise SchemaRefused((), f"has more than {MAX_SHAPES:,} ways to fit it: anyOf within allOf multiply")
    return [found for one in first for other in second if (found := merged(one, other)) is not None]
