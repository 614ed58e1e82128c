"""A JSON Schema as GBNF: only JSON that fits the schema can be written by it.

In: a schema of draft 2020-12. Out: a grammar's text, or SchemaRefused with the keyword that can't be held. Not all that
fits can be written: names come in the schema's order, and none that it does not name where it names some.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import lcm
from typing import Any

from quantize.runtimes.llama_cpp.schema.fitting import fits, never_both
from quantize.runtimes.llama_cpp.schema.grammar import EMPTY, Grammar, Item, literal
from quantize.runtimes.llama_cpp.schema.numbers import integer, number
from quantize.runtimes.llama_cpp.schema.reading import SchemaReader
from quantize.runtimes.llama_cpp.schema.refused import SchemaRefused
from quantize.runtimes.llama_cpp.schema.shapes import ANYTHING, Lists, Maps, Node, ValueShape
from quantize.runtimes.llama_cpp.schema.text import Strings, format_pattern

MAX_MULTIPLES = 1000  # that are written one by one
INDENT = 20  # characters at the start of a line
MAX_COUNTED = 200  # names, where how many of them may come is counted


def gbnf_of(schema: Any) -> str:
    """The grammar. Raises SchemaRefused; RecursionError where it is nested too deeply."""
    compiler = _Compiler(schema)
    return compiler.text()


class _Compiler:
    def __init__(self, schema: Any) -> None:
        self._reader = SchemaReader(schema, never_both)
        self._grammar = Grammar()
        self._strings = Strings(self._grammar)
        self._rules: dict[tuple[int, ...], Item] = {}
        grammar = self._grammar
        indent = grammar.repeat("[ \\t]", 0, INDENT)
        self._space = grammar.rule(EMPTY, (literal(" "),), (literal("\n"), indent))
        self._comma = grammar.rule((literal(","), self._space))
        self._colon = grammar.rule((literal(":"), self._space))

    def text(self) -> str:
        return self._grammar.text(self._value(self._reader.root()))

    def _value(self, node: Node) -> Item:
        """The rule of a node; made before what is in it, so that it may refer to itself."""
        key = self._reader.key(node)
        if key not in self._rules:
            name = self._rules[key] = self._grammar.reserve()
            shapes = self._reader.shapes(node)
            self._grammar.define(name, [row for shape in shapes for row in self._rows(shape)])
        return self._rules[key]

    def _rows(self, shape: ValueShape) -> list[Sequence[Item]]:
        if shape.values is not None:
            found = [
                json.dumps(value, ensure_ascii=False) for value in shape.values if fits(self._reader, value, shape)
            ]
            return [(self._grammar.one_of(found),)] if found else []
        rows: list[Sequence[Item]] = []
        if "null" in shape.types:
            rows.append((literal("null"),))
        if "boolean" in shape.types:
            rows += [(literal("true"),), (literal("false"),)]
        if "integer" in shape.types or "number" in shape.types:
            rows.append((self._number(shape),))
        if "string" in shape.types:
            rows.append((self._string(shape),))
        if "array" in shape.types:
            rows.append((literal("["), self._space, self._list(shape.lists), literal("]")))
        if "object" in shape.types:
            rows.append((literal("{"), self._space, self._map(shape.maps), literal("}")))
        return rows

    def _number(self, shape: ValueShape) -> Item:
        if not shape.steps:
            return (number if "number" in shape.types else integer)(self._grammar, shape.bounds)
        path = shape.steps[-1][1]
        if any(step.denominator != 1 for step, _ in shape.steps):
            raise SchemaRefused(path, "can't be held: a grammar counts in whole numbers")
        step = lcm(*(int(step) for step, _ in shape.steps))
        if step == 1:
            return integer(self._grammar, shape.bounds)
        low, high = shape.bounds.integers()
        if low is None or high is None or (high - low) // step > MAX_MULTIPLES:
            raise SchemaRefused(path, f"can't be held but between bounds with at most {MAX_MULTIPLES:,} multiples")
        found = [str(value) for value in range(-(-low // step) * step, high + 1, step)]
        return self._grammar.one_of(found) if found else self._grammar.rule()

    def _string(self, shape: ValueShape) -> Item:
        texts = shape.texts
        patterns = [*texts.patterns]
        patterns += [(made, path) for name, path in texts.formats if (made := format_pattern(name)) is not None]
        if any(name == "regex" for name, _ in texts.formats):
            raise SchemaRefused(texts.formats[0][1], "can't be held: regex")
        if len(patterns) > 1:
            raise SchemaRefused(patterns[-1][1], "can't be held together with another pattern or format")
        if not patterns:
            return self._strings.any(texts.least, texts.most)
        return self._strings.matching(patterns[0][0], texts.least, texts.most, patterns[0][1])

    def _list(self, lists: Lists) -> Item:
        """What is between the brackets. Where only the first items are told of, no others are written."""
        grammar, space = self._grammar, self._space
        most = lists.most
        if lists.items is None and lists.first and lists.least <= len(lists.first):
            most = len(lists.first) if most is None else min(most, len(lists.first))
        count = len(lists.first) if most is None else min(len(lists.first), most)
        more = grammar.rule((self._comma, self._value(lists.items or ANYTHING), space))
        if count == 0:
            item = grammar.rule((self._value(lists.at(0)), space))
            if most == 0:
                return grammar.rule(EMPTY) if lists.least == 0 else grammar.rule()
            rest = grammar.repeat(more, max(lists.least - 1, 0), None if most is None else most - 1)
            return grammar.rule((item, rest), *((EMPTY,) if lists.least == 0 else ()))
        left = None if most is None else most - count
        rest = grammar.repeat(more, max(lists.least - count, 0), left)
        for index in reversed(range(count)):
            before = (self._comma,) if index else ()
            row = (*before, self._value(lists.first[index]), space, rest)
            rest = grammar.rule(row, *((EMPTY,) if index >= lists.least else ()))
        return rest

    def _map(self, maps: Maps) -> Item:
        """What is between the braces."""
        pairs = [(name in maps.required, self._pair(maps, name)) for name in maps.written]
        free = self._free_pair(maps)
        needed = sum(required for required, _ in pairs)
        if free is not None and maps.least > max(needed, 1):
            raise SchemaRefused((*maps.path, "minProperties"), "can't be held where names are free: one may come twice")
        counted = (maps.most is not None and (maps.most < len(pairs) or free is not None)) or maps.least > needed
        if counted and len(pairs) > MAX_COUNTED:
            raise SchemaRefused((*maps.path, "maxProperties"), f"can't be held with more than {MAX_COUNTED} names")
        return self._members(pairs, free, maps, counted=counted)

    def _members(self, pairs: list[tuple[bool, Item]], free: Item | None, maps: Maps, *, counted: bool) -> Item:
        """From the last to the first: for each how many came before it, or where that does not count, whether any."""
        grammar = self._grammar
        more = None if free is None else grammar.rule((self._comma, free))
        top = len(pairs) if counted else 1
        rest: dict[int, Item] = {}
        for used in range(top + 1):
            least, most = max(maps.least - used, 0), None if maps.most is None else maps.most - used
            if not counted:
                least, most = 0 if used else maps.least, None
            if free is None or more is None:
                rest[used] = grammar.rule(EMPTY) if least <= 0 and (most is None or most >= 0) else grammar.rule()
            elif used:
                rest[used] = grammar.repeat(more, least, most)
            else:
                rows = [(free, grammar.repeat(more, max(least - 1, 0), None if most is None else most - 1))]
                rest[used] = grammar.rule(*rows, *((EMPTY,) if least == 0 else ()))
        for required, pair in reversed(pairs):
            before = dict(rest)
            for used in range(top + 1):
                row = (*((self._comma,) if used else ()), pair, before[min(used + 1, top)])
                full = counted and maps.most is not None and used >= maps.most
                rows = ([] if full else [row]) + ([] if required else [(before[used],)])
                rest[used] = grammar.rule(*rows)
        return rest[0]

    def _pair(self, maps: Maps, name: str) -> Item:
        names = maps.names
        if names is not None and not any(fits(self._reader, name, shape) for shape in self._reader.shapes(names)):
            return self._grammar.rule()
        shown = literal(json.dumps(name, ensure_ascii=False))
        return self._grammar.rule((shown, self._colon, self._value(maps.at(name)), self._space))

    def _free_pair(self, maps: Maps) -> Item | None:
        """A member whose name is not told; None where there is none."""
        value = self._value
        rows: list[Sequence[Item]] = []
        if maps.is_open:
            rows.append((self._free_name(maps), self._colon, value(maps.others or ANYTHING), self._space))
        for pattern, node, path in maps.patterns:
            if len(maps.patterns) > 1 or maps.is_open or any(maps.matches(name) for name in maps.written):
                why = "can't be held together with names, other patterns, or additionalProperties that allow names"
                raise SchemaRefused(path, why)
            if maps.names is not None:
                raise SchemaRefused(path, "can't be held together with propertyNames")
            rows.append((self._strings.matching(pattern, 0, None, path), self._colon, value(node), self._space))
        return self._grammar.rule(*rows) if rows else None

    def _free_name(self, maps: Maps) -> Item:
        if maps.names is None:
            return self._strings.other_names(maps.written)
        if maps.written:
            raise SchemaRefused((*maps.path, "propertyNames"), "can't be held together with names that are told")
        shapes = [shape for shape in self._reader.shapes(maps.names) if "string" in shape.types]
        rows = []
        for shape in shapes:
            given = shape.values
            texts = [value for value in given or () if isinstance(value, str) and fits(self._reader, value, shape)]
            names = [json.dumps(text, ensure_ascii=False) for text in texts]
            rows.append((self._string(shape) if given is None else self._grammar.one_of(names),))
        return self._grammar.rule(*rows)
