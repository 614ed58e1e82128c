"""Whether a value fits a shape, and whether what is written to fit one shape can fit another.

In: values of `enum` and `const`, shapes of `oneOf`. Out: yes or no. A format only describes a value that is given.
"""

from __future__ import annotations

import re
from fractions import Fraction
from math import isfinite
from typing import Any

from quantize.runtimes.llama_cpp.schema.reading import SchemaReader
from quantize.runtimes.llama_cpp.schema.refused import SchemaRefused
from quantize.runtimes.llama_cpp.schema.shapes import Lists, Maps, Node, Texts, ValueShape, frozen

DEPTH = 6  # of shapes within shapes that are told apart


def fits(reader: SchemaReader, value: Any, shape: ValueShape) -> bool:
    """Whether a JSON value fits. Raises SchemaRefused: a pattern can't be read."""
    kind = _kind(value)
    if kind not in shape.types or (shape.known is not None and frozen(value) not in shape.known):
        return False
    if isinstance(value, str):
        return _fits_text(value, shape.texts)
    if isinstance(value, list):
        return _fits_list(reader, value, shape.lists)
    if isinstance(value, dict):
        return _fits_map(reader, value, shape.maps)
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, float) and not isfinite(value):  # a number too large to be written
        return False
    exact = Fraction(str(value))
    return shape.bounds.has(exact) and all((exact / step).denominator == 1 for step, _ in shape.steps)


def never_both(reader: SchemaReader, first: ValueShape, second: ValueShape, depth: int = DEPTH) -> bool:
    """Whether nothing that is written to fit the first fits the second. False where it can't be told."""
    common = first.types & second.types
    if not common or depth == 0:
        return not common
    if first.values is not None:
        return not any(fits(reader, value, first) and fits(reader, value, second) for value in first.values)
    if second.values is not None:
        return not any(fits(reader, value, first) and fits(reader, value, second) for value in second.values)
    if common & {"null", "boolean"}:
        return False
    if common & {"integer", "number"} and not first.bounds.apart(second.bounds):
        return False
    if "string" in common and not _lengths_apart(first.texts, second.texts):
        return False
    if "array" in common and not _lists_apart(reader, first.lists, second.lists, depth):
        return False
    return "object" not in common or _maps_apart(reader, first.maps, second.maps, depth)


def _kind(value: Any) -> str:
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    names = {bool: "boolean", int: "integer", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _fits_text(value: str, texts: Texts) -> bool:
    if len(value) < texts.least or (texts.most is not None and len(value) > texts.most):
        return False
    for pattern, path in texts.patterns:
        try:
            if re.search(pattern, value) is None:
                return False
        except (re.error, RecursionError, OverflowError) as exc:
            raise SchemaRefused(path, "the pattern can't be read") from exc
    return True


def _fits_list(reader: SchemaReader, value: list[Any], lists: Lists) -> bool:
    if len(value) < lists.least or (lists.most is not None and len(value) > lists.most):
        return False
    return all(_fits_node(reader, item, lists.at(index)) for index, item in enumerate(value))


def _fits_map(reader: SchemaReader, value: dict[str, Any], maps: Maps) -> bool:
    if len(value) < maps.least or (maps.most is not None and len(value) > maps.most):
        return False
    if any(name not in value for name in maps.required):
        return False
    if maps.names is not None and not all(_fits_node(reader, name, maps.names) for name in value):
        return False
    return all(_fits_node(reader, item, maps.at(name)) for name, item in value.items())


def _fits_node(reader: SchemaReader, value: Any, node: Node) -> bool:
    return any(fits(reader, value, shape) for shape in reader.shapes(node))


def _nodes_apart(reader: SchemaReader, first: Node, second: Node, depth: int) -> bool:
    return all(never_both(reader, one, two, depth - 1) for one in reader.shapes(first) for two in reader.shapes(second))


def _lengths_apart(first: Texts | Lists, second: Texts | Lists) -> bool:
    return (first.most is not None and first.most < second.least) or (
        second.most is not None and second.most < first.least
    )


def _lists_apart(reader: SchemaReader, first: Lists, second: Lists, depth: int) -> bool:
    both = range(min(first.least, 64))
    return _lengths_apart(first, second) or any(
        _nodes_apart(reader, first.at(index), second.at(index), depth) for index in both
    )


def _maps_apart(reader: SchemaReader, first: Maps, second: Maps, depth: int) -> bool:
    for name in dict.fromkeys((*first.required, *second.required)):
        if name in second.required and not first.writes(name):
            return True
        if _nodes_apart(reader, first.at(name), second.at(name), depth):
            return True
    return False
