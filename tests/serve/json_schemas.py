"""Schemas to try: those that have hurt others, and any by chance; and a walk that writes whatever a grammar allows."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from quantize.runtimes.intake import Intake
from quantize.runtimes.llama_cpp.served import DESK
from quantize.runtimes.llama_cpp.words import open_words
from quantize.runtimes.served import Refused

TOKENS = 160  # of a walk: one that is not over by then is not whole

# Each has ended, stalled or misled a server of models somewhere.
WORST: dict[str, Any] = {
    "a bound of 20,000 characters": {"type": "string", "maxLength": 20_000},
    "a bound of 65,535 items": {"type": "array", "maxItems": 65_535, "items": {"type": "integer"}},
    "a counted pattern": {"type": "string", "pattern": "^(a|b{1,20000}){1,20000}$"},
    "bounds within bounds": {"type": "array", "minItems": 9999, "items": {"type": "array", "minItems": 9999}},
    "5,000 values": {"enum": [f"value {number * 7919 % 5000}" for number in range(5000)]},
    "65,535 values": {"enum": [f"{number:x}" for number in range(65_535)]},
    "what never ends": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "many ways": {"allOf": [{"anyOf": [{"title": str(way)} for way in range(20)]} for _ in range(20)]},
    "a pattern that backtracks": {"pattern": "^(a+)+$", "enum": ["a" * 40 + "!"]},
    "90 objects in one another": None,
    "a ring of references": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
}
_nested: dict[str, Any] = {"type": "string"}
for _ in range(90):
    _nested = {"type": "object", "properties": {"a": _nested}, "required": ["a"]}
WORST["90 objects in one another"] = _nested


@dataclass
class Walker:
    """Writes at random what a grammar allows, by llama.cpp's own grammars over a file's vocabulary; no model is run."""

    intake: Intake
    pieces: Sequence[bytes]
    ends: frozenset[int]

    @classmethod
    def over(cls, path: Path) -> Walker:
        """With the vocabulary of a GGUF file."""
        words = open_words(path, feature="testing")
        tokens = range(words.vocabulary)
        intake = Intake(DESK, str(path).encode())
        intake.warning()
        return cls(intake, [words.piece(token) for token in tokens], frozenset(t for t in tokens if words.ends(t)))

    def write(self, fit: dict[str, Any], seed: int) -> str | None:
        """A whole text; None where it did not come to an end. Raises Refused."""
        chance = random.Random(seed)
        prompt = self.intake.read({"prompt": [1], "fit": {"param": "response_format", **fit}}, threading.Event())
        written = b""
        assert prompt.masks is not None
        try:
            for _ in range(TOKENS):
                while (mask := prompt.masks.poll()) is None:
                    prompt.masks.pipe.poll(10)
                fitting = [token for token, hidden in enumerate(mask) if not hidden]
                assert fitting, "a trap: nothing may come next"
                ending = [token for token in fitting if token in self.ends]
                if ending and (chance.random() < 0.4 or len(ending) == len(fitting)):
                    return written.decode()
                closing = [token for token in fitting if set(self.pieces[token]) & set(b'"]}')]
                token = chance.choice(closing if closing and chance.random() < 0.4 else fitting)
                written += self.pieces[token]
                prompt.masks.accept(token)
        finally:
            prompt.close()
        return None

    def schema(self, schema: Any, seed: int = 0) -> str | Refused | None:
        """The same for a JSON Schema, or why it is refused."""
        try:
            return self.write({"json_schema": json.dumps(schema)}, seed)
        except Refused as exc:
            return exc


_NAMES = st.sampled_from(["a", "b", "ab", "é", 'q"', "type", "$ref", "x-1", ""])
_TEXTS = st.text('ab1-é "\\\n', max_size=4)
_NUMBERS = st.integers(-30, 30) | st.sampled_from([0.5, -2.25, 1e3, 10**20, 0.1])
_VALUES = st.recursive(
    st.none() | st.booleans() | _NUMBERS | _TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_NAMES, inner, max_size=2), max_leaves=4,
)  # fmt: skip
_COUNTS = st.integers(0, 4) | st.sampled_from([2.0, 300, 20_000, 10**12])
PATTERNS = st.sampled_from([
    r"^\d{3}$", r"^[0-9]+$", "a", "^a|b$", r"^(?:a|b)*$", r"[^a]", r"\w\s\S", r"^[\s\S]*$", r"^[^\d\w]$",
    r"^\x41\u0042", "^(a?b?)*$", "^.{0,2000}$", "^[a-f]{2}-[a-z]{1,3}$", r"^\[\]\/\.$", "^[-+]?[0-9]",
    "(^a$|^b$)", "^(?=a)", "a**", "[", r"(\w+)\1", "^a{2,1}$", r"\p{L}", "(?i)a", "^$",
    "", r"\bx", "^(((a)))$", "^[\\]-]+$", "x{,3}",
])  # fmt: skip
FORMATS = st.sampled_from([
    "date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid", "json-pointer",
    "relative-json-pointer", "iri", "uri-template", "idn-email", "regex", "phone",
])  # fmt: skip


def schemas(depth: int = 3) -> st.SearchStrategy[Any]:
    """Schemas of all keywords, most of them sound."""
    inner = schemas(depth - 1) if depth else st.sampled_from([True, {"type": "integer"}, {"type": "string"}])
    several = st.lists(inner, min_size=1, max_size=3)
    named = st.dictionaries(_NAMES, inner, max_size=3)
    sound: dict[str, st.SearchStrategy[Any]] = {
        "enum": st.lists(_VALUES, min_size=1, max_size=4), "const": _VALUES, "minLength": _COUNTS, "maxLength": _COUNTS,
        "pattern": PATTERNS, "format": FORMATS, "minimum": _NUMBERS, "maximum": _NUMBERS, "exclusiveMinimum": _NUMBERS,
        "exclusiveMaximum": _NUMBERS, "multipleOf": st.sampled_from([1, 2, 7, 0.5]), "items": inner,
        "prefixItems": several, "minItems": _COUNTS, "maxItems": _COUNTS, "properties": named, "additionalProperties":
        inner | st.booleans(), "required": st.lists(_NAMES, max_size=2, unique=True), "patternProperties":
        st.dictionaries(PATTERNS, inner, max_size=2), "propertyNames": st.just({"pattern": "^[a-z]"}) | inner,
        "minProperties": st.integers(0, 3), "maxProperties": st.integers(0, 3), "anyOf": several, "oneOf": several,
        "allOf": several, "$ref": st.sampled_from(["#", "#/$defs/a", "#/$defs/b", "#/properties/a", "#none"]),
        "unevaluatedProperties": st.booleans(), "unevaluatedItems": st.booleans(), "uniqueItems": st.booleans(),
        "not": inner, "if": inner, "contains": inner, "title": _TEXTS, "dependentRequired": st.just({"a": ["b"]}),
    }  # fmt: skip
    usual = [
        "properties",
        "required",
        "items",
        "enum",
        "anyOf",
        "pattern",
        "maxLength",
        "minimum",
        "additionalProperties",
    ]
    types = st.sampled_from(["object", "array", "string", "integer", "number", "boolean", "null", ["string", "null"]])

    @st.composite
    def draw_one(draw: st.DrawFn) -> Any:
        words = draw(st.lists(st.sampled_from(usual), max_size=3) | st.lists(st.sampled_from(list(sound)), max_size=3))
        schema = {word: draw(sound[word]) for word in words}
        if draw(st.integers(0, 3)):
            schema["type"] = draw(types)
        if draw(st.integers(0, 30)) == 0:
            schema[draw(st.sampled_from(list(sound)))] = draw(_VALUES)
        if depth == 3:
            schema["$defs"] = {"a": draw(inner), "b": draw(inner)}
        return schema

    return draw_one()
