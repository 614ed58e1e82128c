"""JSON strings as grammar rules: any, of a length, of a pattern, of a format; and names that are none of some.

In: trees of patterns, lengths, formats by name. Out: rules that write a string with its quotes, escaped as JSON is.
"""

from __future__ import annotations

from collections.abc import Iterable

from quantize.runtimes.llama_cpp.schema.grammar import Grammar, Item, Ranges, characters, literal
from quantize.runtimes.llama_cpp.schema.pattern import (
    ALL,
    Chars,
    Either,
    Node,
    Row,
    Times,
    not_empty,
    read_pattern,
    width,
    within,
)
from quantize.runtimes.llama_cpp.schema.refused import Path, SchemaRefused

QUOTE = literal('"')
PLAIN: Ranges = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, 0x10FFFF))  # what JSON writes as it is
SHORT = {0x08: "b", 0x09: "t", 0x0A: "n", 0x0C: "f", 0x0D: "r", 0x22: '"', 0x5C: "\\"}
HEX = "[0-9a-fA-F]"
MAX_NAME = 400  # characters of a name that free names must differ from

_YEAR, _HOUR, _MINUTE = "[12]\\d{3}", "(?:[01]\\d|2[0-3])", "[0-5]\\d"
_LONG, _OTHER, _FEBRUARY = (
    "(?:0[13578]|1[02])-(?:0[1-9]|[12]\\d|3[01])",
    "(?:0[469]|11)-(?:0[1-9]|[12]\\d|30)",
    "02-(?:0[1-9]|1\\d|2[0-8])",
)
_DATE = f"{_YEAR}-(?:{_LONG}|{_OTHER}|{_FEBRUARY})"
_DURATION = "(?:\\d{1,3}Y)?\\d{1,3}M(?:\\d{1,3}D)?|\\d{1,4}D(?:T\\d{1,3}H(?:\\d{1,3}M)?)?|T\\d{1,4}[HMS]|\\d{1,4}W"
_TIME = f"{_HOUR}:{_MINUTE}:{_MINUTE}(?:\\.\\d{{1,6}})?(?:Z|[+-]{_HOUR}:{_MINUTE})"
_LABEL = "[a-z0-9]{1,20}(?:-[a-z0-9]{1,20})?"
_HOST = f"{_LABEL}(?:\\.{_LABEL}){{0,4}}"
_BYTE = "(?:25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)"
_URI = f"https?://{_HOST}(?::[1-9]\\d{{1,3}})?(?:/[A-Za-z0-9._~-]{{0,64}}){{0,16}}"
_EMAIL = f"[A-Za-z0-9]{{1,20}}(?:[._+-][A-Za-z0-9]{{1,20}}){{0,2}}@{_LABEL}(?:\\.{_LABEL}){{0,3}}\\.[a-z]{{2,8}}"
_POINTER = "(?:/(?:[^~/\\x00-\\x1f]|~[01]){0,64}){0,16}"
# The formats of draft 2020-12: what each writes is of the format, if not all of it. `regex` is not among them.
FORMATS = {
    "date": _DATE, "time": _TIME, "date-time": f"{_DATE}T{_TIME}",
    "duration": f"P(?:{_DURATION})",
    "email": _EMAIL, "idn-email": _EMAIL, "hostname": _HOST, "idn-hostname": _HOST,
    "ipv4": f"{_BYTE}(?:\\.{_BYTE}){{3}}", "ipv6": "[0-9a-f]{1,4}(?::[0-9a-f]{1,4}){7}",
    "uri": _URI, "uri-reference": _URI, "iri": _URI, "iri-reference": _URI, "uri-template": _URI,
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "json-pointer": _POINTER, "relative-json-pointer": f"(?:0|[1-9]\\d{{0,3}})(?:#|{_POINTER})",
}  # fmt: skip


def format_pattern(name: str) -> str | None:
    """A pattern that is all of a format's; None: JSON Schema knows no such format, so that it only describes."""
    return f"^(?:{FORMATS[name]})$" if name in FORMATS else None


class Strings:
    """Rules for JSON strings in one grammar."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar

    def any(self, least: int = 0, most: int | None = None) -> Item:
        """Any string of so many characters."""
        return self._grammar.rule((QUOTE, self._grammar.repeat(self._chars(ALL), least, most), QUOTE))

    def matching(self, pattern: str, least: int, most: int | None, path: Path) -> Item:
        """Strings of so many characters in which a pattern is found. Raises SchemaRefused."""
        rows = (within(row, least, most, path) for row in read_pattern(pattern, path))
        return self._grammar.rule(*((QUOTE, self._node(row), QUOTE) for row in rows if row is not None))

    def other_names(self, taken: Iterable[str]) -> Item:
        """Names without escapes that are none of these, and not empty."""
        names = sorted({name for name in taken if name})
        return self._grammar.rule((QUOTE, self._others(names, 0), QUOTE))

    def _others(self, names: list[str], depth: int) -> Item:
        """What may follow `depth` characters that all of these begin with."""
        if depth > MAX_NAME:
            raise SchemaRefused((), f"a name of more than {MAX_NAME} characters beside names that are free")
        heads: dict[str, list[str]] = {}
        for name in names:
            if len(name) > depth:
                heads.setdefault(name[depth], []).append(name)
        rest = self._grammar.repeat(characters(PLAIN), 0, None)
        alternatives: list[tuple[Item, ...]] = [(characters(_without(PLAIN, map(ord, heads))), rest)]
        for head, below in heads.items():
            if any(low <= ord(head) <= high for low, high in PLAIN):
                alternatives.append((literal(head), self._others(below, depth + 1)))
        if depth and not any(len(name) == depth for name in names):
            alternatives.append(())
        return self._grammar.rule(*alternatives)

    def _node(self, node: Node) -> Item:
        grammar = self._grammar
        if isinstance(node, Chars):
            return self._chars(node.ranges)
        if isinstance(node, Row):
            return grammar.rule([self._node(part) for part in node.parts])
        if isinstance(node, Either):
            return grammar.rule(*((self._node(part),) for part in node.parts))
        assert isinstance(node, Times)
        if node.most is None and width(node.part)[0] == 0:
            return grammar.repeat(self._node(not_empty(node.part)), 0, None)
        return grammar.repeat(self._node(node.part), node.least, node.most)

    def _chars(self, ranges: Ranges) -> Item:
        """One character of these, in one of the ways that JSON writes it."""
        grammar = self._grammar
        alternatives: list[tuple[Item, ...]] = []
        plain = [(max(low, a), min(high, b)) for low, high in ranges for a, b in PLAIN if max(low, a) <= min(high, b)]
        if plain:
            alternatives.append((characters(plain),))
        escapes = [sign for code, sign in SHORT.items() if any(low <= code <= high for low, high in ranges)]
        if escapes:
            alternatives.append((literal("\\"), characters([(ord(sign), ord(sign)) for sign in escapes])))
        if tuple(ranges) == tuple(ALL):
            alternatives.append((literal("\\u"), grammar.rule(("[0-9a-cA-CefEF]", HEX), ("[dD]", "[0-7]")), HEX, HEX))
        elif not alternatives:
            codes = [code for low, high in ranges for code in range(low, min(high, 0x1F) + 1)]
            alternatives += [(literal(f"\\u{code:04x}"),) for code in codes]
        return grammar.rule(*alternatives)


def _without(ranges: Ranges, codes: Iterable[int]) -> Ranges:
    found = list(ranges)
    for code in codes:
        split = []
        for low, high in found:
            ends = ((low, code - 1), (code + 1, high)) if low <= code <= high else ((low, high),)
            split += [(first, last) for first, last in ends if first <= last]
        found = split
    return found
