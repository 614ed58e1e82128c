"""The keywords of JSON Schema, draft 2020-12, one by one: what each must be, and whether a grammar can hold it.

In: a schema object as it came. Out: nothing, or SchemaRefused that names the keyword. A keyword that is in no table
describes: JSON Schema has it so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

from quantize.runtimes.llama_cpp.schema.numbers import decimals_of
from quantize.runtimes.llama_cpp.schema.refused import Path, SchemaRefused

TYPES = ("null", "boolean", "object", "array", "number", "integer", "string")
MAX_VALUES = 100_000

# Held, as compile.py and reading.py do.
HELD: dict[str, tuple[Callable[[Any], bool], str]] = {}
# Never held by a grammar, whatever it says.
REFUSED = {
    "$dynamicRef": "it depends on where it is reached from",
    "$recursiveRef": "it depends on where it is reached from",
    "additionalItems": "draft 2020-12 has prefixItems and items instead",
    "dependencies": "draft 2020-12 has dependentRequired and dependentSchemas instead",
}
# Not held, unless they ask for nothing.
REFUSED_UNLESS: dict[str, tuple[tuple[Any, ...], str]] = {
    "contains": ((), "a grammar does not look for one among many"),
    "dependentRequired": (({},), "a grammar does not look back at what was written"),
    "dependentSchemas": (({},), "a grammar does not look back at what was written"),
    "if": ((), "a grammar does not look back at what was written: use anyOf"),
    "not": ((False,), "a grammar says what comes, not what does not"),
    "uniqueItems": ((False,), "a grammar does not remember what was written"),
}
# What describes, identifies or is looked up by others; `then` and `else` mean nothing without `if`, and so on.
DESCRIPTIVE = frozenset({
    "$schema", "$id", "$anchor", "$dynamicAnchor", "$recursiveAnchor", "$comment", "$defs", "definitions",
    "$vocabulary", "title", "description", "default", "deprecated", "readOnly", "writeOnly", "examples",
    "contentEncoding", "contentMediaType", "contentSchema", "then", "else", "minContains", "maxContains",
})  # fmt: skip


def check(schema: Mapping[str, Any], path: Path, *, root: bool) -> None:
    """Every keyword of a schema object. Raises SchemaRefused: one is not what it must be, or can't be held."""
    for name, value in schema.items():
        here = (*path, name)
        if name in REFUSED:
            raise SchemaRefused(here, f"can't be held: {REFUSED[name]}")
        if name in REFUSED_UNLESS:
            trivial, why = REFUSED_UNLESS[name]
            if not any(value == item and type(value) is type(item) for item in trivial):
                if name == "uniqueItems" and value is True and schema.get("maxItems") in (0, 1):
                    continue
                raise SchemaRefused(here, f"can't be held: {why}")
        elif name in HELD:
            is_right, what = HELD[name]
            if not is_right(value):
                raise SchemaRefused(here, f"must be {what}")
        elif name == "$id" and not root:
            raise SchemaRefused(here, "can't be held: a schema within a schema that is identified on its own")


def is_schema(value: Any) -> bool:
    """Whether it is an object or a boolean."""
    return isinstance(value, dict | bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _is_bound(value: Any) -> bool:
    from fractions import Fraction

    return _is_number(value) and decimals_of(Fraction(str(value))) is not None


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_type(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(isinstance(name, str) and name in TYPES for name in names)


def _are_schemas(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(is_schema(item) for item in value)


def _has_schemas(value: Any) -> bool:
    return isinstance(value, dict) and all(is_schema(item) for item in value.values())


_COUNT = (_is_count, "a whole number of at least 0")
_BOUND = (_is_bound, "a number of at most 60 decimals")
_SCHEMA = (is_schema, "a schema")
_SCHEMAS = (_are_schemas, "a list of schemas, not empty")
_NAMED = (_has_schemas, "an object of schemas")
_TEXT = (lambda value: isinstance(value, str), "a string")
HELD |= {
    "type": (_is_type, f"one or more of {', '.join(TYPES)}"),
    "enum": (lambda value: isinstance(value, list) and 0 < len(value) <= MAX_VALUES,
             f"a list of values, not empty, of at most {MAX_VALUES:,}"),
    "const": (lambda _: True, "any value"),
    "$ref": (lambda value: isinstance(value, str) and value.startswith("#"),
             "a reference within the schema, such as #/$defs/name"),
    "allOf": _SCHEMAS, "anyOf": _SCHEMAS, "oneOf": _SCHEMAS,
    "properties": _NAMED, "patternProperties": _NAMED, "additionalProperties": _SCHEMA, "propertyNames": _SCHEMA,
    "unevaluatedProperties": _SCHEMA, "required": (_is_names, "a list of names"),
    "minProperties": _COUNT, "maxProperties": _COUNT,
    "items": (is_schema, "a schema; draft 2020-12 has prefixItems for a list of them"),
    "prefixItems": _SCHEMAS, "unevaluatedItems": _SCHEMA, "minItems": _COUNT, "maxItems": _COUNT,
    "minLength": _COUNT, "maxLength": _COUNT, "pattern": _TEXT, "format": _TEXT,
    "minimum": _BOUND, "maximum": _BOUND, "exclusiveMinimum": _BOUND, "exclusiveMaximum": _BOUND,
    "multipleOf": (lambda value: _is_bound(value) and value > 0, "a number greater than 0"),
}  # fmt: skip
