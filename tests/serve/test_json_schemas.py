"""JSON Schema as a grammar: what it writes fits by the jsonschema library, what it can't hold is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import jsonschema_specifications
import pytest
from hypothesis import HealthCheck, example, given, note, settings
from hypothesis import strategies as st

from quantize.runtimes.llama_cpp.schema import keywords
from quantize.runtimes.llama_cpp.schema.compile import gbnf_of
from quantize.runtimes.llama_cpp.schema.refused import SchemaRefused
from quantize.runtimes.served import Refused
from tests.serve.json_schemas import WORST, Walker, schemas

pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def walker(weights: Path) -> Iterator[Walker]:
    made = Walker.over(weights)
    yield made
    made.intake.close()


def check(schema: Any, text: str | Refused | None) -> None:
    """What was written to the end fits."""
    assert not isinstance(text, Refused), text
    if text is not None:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))


HELD: list[Any] = [
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"type": "string", "pattern": r"^\d{3}$"},
    {"type": "string", "pattern": "^[0-9]+$", "maxLength": 4},
    {"type": "string", "pattern": "ab"},
    {"type": "string", "pattern": r"^[^\d\s]{2}\.$"},
    {"type": "string", "format": "date-time"},
    {"type": "integer", "minimum": -3, "maximum": 120},
    {"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 50},
    {"type": "number", "exclusiveMinimum": 0.1, "maximum": 0.5},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False},
    {"type": "object", "properties": {"a": True, "b": False}, "required": ["a"]},
    {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#"}}, "required": ["v"]},
    {"type": "object", "additionalProperties": {"type": "integer"}, "properties": {"ab": {"type": "null"}}},
    {"type": "object", "patternProperties": {"^x-": {"type": "integer"}}, "additionalProperties": False},
    {"type": "object", "propertyNames": {"pattern": "^[a-c]{2}$"}, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "minProperties": 2, "maxProperties": 2, "properties": {"a": {}, "b": {}, "c": {}}},
    {"type": "array", "uniqueItems": True, "maxItems": 1},
    {"enum": ["a", 1, None, {"b": [True, 2.5]}], "type": ["string", "object"]},
    {"const": 'é"\\\n'},
    {"oneOf": [{"type": "object", "properties": {"k": {"const": k}, k: {"type": "null"}}, "required": ["k"]}
               for k in "xy"]},
    {"allOf": [{"properties": {"a": {"type": "string"}}, "required": ["a"]}, {"properties": {"a": {"maxLength": 1}}}],
     "type": "object"},
    {"$ref": "#here", "$defs": {"x": {"$anchor": "here", "type": "integer", "maximum": 3}}, "minimum": 1},
    {"$id": "urn:x", "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "null", "default": 3},
    {"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False},
    {"type": "string", "maxLength": 20_000}, {"type": "array", "maxItems": 65_535, "items": {"type": "null"}},
    {"type": "string", "pattern": "^a{1,20000}$"},
    {},
]  # fmt: skip


@pytest.mark.parametrize("schema", HELD, ids=lambda schema: json.dumps(schema)[:60])
def test_what_is_written_fits(walker: Walker, schema: Any) -> None:
    written = [walker.schema(schema, seed) for seed in range(12)]
    for text in written:
        check(schema, text)
    assert any(isinstance(text, str) for text in written), "nothing came to an end"


REFUSALS = [
    ({"uniqueItems": True}, "schema.uniqueItems: can't be held"),
    ({"items": {"uniqueItems": True}}, "schema.items.uniqueItems: can't be held"),
    ({"properties": {"a": {"contains": {}}}}, "schema.properties.a.contains: can't be held"),
    ({"not": {}}, "schema.not: can't be held"),
    ({"if": {}, "then": False}, "schema.if: can't be held"),
    ({"dependentRequired": {"a": ["b"]}}, "schema.dependentRequired: can't be held"),
    ({"dependentSchemas": {"a": {}}}, "schema.dependentSchemas: can't be held"),
    ({"$dynamicRef": "#a"}, r"schema.\$dynamicRef: can't be held"),
    ({"$ref": "https://example.org/x"}, r"schema.\$ref: must be a reference within the schema"),
    ({"$ref": "#/$defs/x"}, r"schema.\$ref: refers to what is not there"),
    ({"$ref": "#x"}, r"schema.\$ref: refers to an anchor"),
    ({"$ref": "#"}, "refers to itself without end"),
    ({"required": ["a"], "properties": {"a": {"$ref": "#"}}, "type": "object"}, "no value that comes to an end fits"),
    ({"type": "string", "minLength": 2, "maxLength": 1}, "no value that comes to an end fits"),
    ({"type": "integer", "minimum": 0.1, "maximum": 0.9}, "no value that comes to an end fits"),
    ({"enum": ["a"], "type": "integer"}, "no value that comes to an end fits"),
    ({"maxLength": -1}, "schema.maxLength: must be a whole number"),
    ({"maxLength": True}, "schema.maxLength: must be a whole number"),
    ({"minimum": "0"}, "schema.minimum: must be a number"),
    ({"minimum": 1e-300}, "schema.minimum: must be a number"),
    ({"maximum": float("inf")}, "schema.maximum: must be a number"),
    ({"maxLength": float("nan")}, "schema.maxLength: must be a whole number"),
    ({"const": float("inf")}, "no value that comes to an end fits"),
    ({"type": "text"}, "schema.type: must be one or more of"),
    ({"items": [{}]}, "schema.items: must be a schema; draft 2020-12 has prefixItems"),
    ({"properties": {"a": 1}}, "schema.properties: must be an object of schemas"),
    ({"anyOf": []}, "schema.anyOf: must be a list of schemas"),
    ({"properties": {"a": {"$id": "urn:y"}}}, r"schema.properties.a.\$id: can't be held"),
    ({"pattern": "^(?=a)"}, "schema.pattern: at 1: what looks ahead or behind"),
    ({"pattern": r"(a)\1"}, r"schema.pattern: at 5: \\1 can't be held"),
    ({"pattern": "("}, r"schema.pattern: at 1: a \( without its \)"),
    ({"pattern": "a^b"}, r"schema.pattern: \^ and \$ are held at the ends"),
    ({"pattern": "^[a-z]+[0-9]+$", "maxLength": 9}, "schema.pattern: together with minLength or maxLength"),
    ({"pattern": "a", "format": "date"}, "schema.format: can't be held together"),
    ({"format": "regex"}, "schema.format: can't be held: regex"),
    ({"multipleOf": 0.1}, "schema.multipleOf: can't be held"),
    ({"multipleOf": 3}, "schema.multipleOf: can't be held but between bounds"),
    ({"oneOf": [{"type": "integer"}, {"minimum": 3}]}, "schema.oneOf: can't be held: what fits choice 0 may fit"),
    ({"patternProperties": {"^a": {}}, "properties": {"ab": {}}}, r"schema.patternProperties.\^a: can't be held"),
    ({"minProperties": 3, "type": "object"}, "schema.minProperties: can't be held where names are free"),
    ({"allOf": [{"anyOf": [{}] * 20}] * 4}, "ways to fit it: anyOf within allOf multiply"),
    ({"enum": [f"{number * 2654435761 % 2**32:x}{'y' * 40}" for number in range(99_000)]}, "more than 1,500,000 parts"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "why"), REFUSALS, ids=[why[:50] for _, why in REFUSALS])
def test_what_can_not_be_held_is_refused_by_name(schema: Any, why: str) -> None:
    with pytest.raises(SchemaRefused, match=why):
        gbnf_of(schema)


def test_every_keyword_of_the_draft_is_known() -> None:
    """Of the draft's own vocabularies; and of each the tables say one thing only."""
    found: set[str] = set()
    for resource in jsonschema_specifications.REGISTRY.values():
        if "draft/2020-12/" in str(resource.id()):
            found |= resource.contents.get("properties", {}).keys()
    tables = [keywords.HELD, keywords.REFUSED, keywords.REFUSED_UNLESS, keywords.DESCRIPTIVE]
    assert found - set().union(*tables) == set()
    assert len(found) > 50
    assert sum(map(len, tables)) == len(set().union(*tables))


def test_a_bound_costs_its_digits() -> None:
    small, large = (len(gbnf_of({"type": "string", "maxLength": most})) for most in (20_000, 10**18))
    assert large < 4 * small


@pytest.mark.parametrize("name", WORST)
def test_the_worst_are_written_or_refused(walker: Walker, name: str) -> None:
    told = walker.schema(WORST[name])
    if isinstance(told, Refused):
        assert (told.fields["status"], told.fields["param"]) == (422, "response_format")
    else:
        check(WORST[name], told)
    assert walker.schema({"const": 1}) == "1"


@given(schema=schemas(), seed=st.integers(0, 3))
@example({"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}, 0)
@settings(
    max_examples=250, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
def test_any_schema_is_refused_by_name_or_what_is_written_fits(walker: Walker, schema: Any, seed: int) -> None:
    told = walker.schema(schema, seed)
    note(str(told))
    if isinstance(told, Refused):
        assert (told.fields["status"], told.fields["code"]) == (422, "invalid_json_schema")
        assert str(told).startswith("schema")
    else:
        check(schema, told)
