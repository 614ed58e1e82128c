"""Regular expressions of JSON Schema (ECMA-262), read into a tree: what a grammar can hold, and that readers agree on.

In: a pattern. Out: its alternatives, as trees of characters, rows, choices and repetitions; a search's free ends are
part of them. SchemaRefused says what of a pattern is not held: what looks around, back, or at the edge of a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from quantize.runtimes.llama_cpp.schema.grammar import Ranges
from quantize.runtimes.llama_cpp.schema.refused import Path, SchemaRefused

MAX_PATTERN = 4096
LAST = 0x10FFFF
ALL: Ranges = ((0, 0xD7FF), (0xE000, LAST))
DIGITS: Ranges = ((0x30, 0x39),)
WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
SPACE: Ranges = ((0x09, 0x0D), (0x20, 0x20))
# What is none of these in any reader's view: some have all of Unicode's digits, letters or spaces, some only ASCII's.
NO_DIGIT: Ranges = ((0x00, 0x2F), (0x3A, 0x65F), (0x3041, 0x9FFF), (0xAC00, 0xD7A3))
NO_WORD: Ranges = ((0x00, 0x2F), (0x3A, 0x40), (0x5B, 0x5E), (0x60, 0x60), (0x7B, 0x7F))
NO_SPACE: Ranges = ((0x00, 0x08), (0x0E, 0x1B), (0x21, 0x84), (0x86, 0x9F), (0xA1, 0x167F), (0x1681, 0x1FFF),
                    (0x2030, 0x205E), (0x2060, 0x2FFF), (0x3001, 0xD7FF), (0xE000, 0xFEFE), (0xFF00, LAST))  # fmt: skip
NO_LINE_END: Ranges = ((0x00, 0x09), (0x0B, 0x0C), (0x0E, 0x2027), (0x202A, 0xD7FF), (0xE000, LAST))
CLASSES = {"d": DIGITS, "D": NO_DIGIT, "w": WORD, "W": NO_WORD, "s": SPACE, "S": NO_SPACE}
CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13}
AROUND = ("(?=", "(?!", "(?<=", "(?<!")
_COUNTED = re.compile(r"\{(\d{1,9})(?:(,)(\d{1,9})?)?\}")


@dataclass(frozen=True)
class Chars:
    """One character."""

    ranges: Ranges


@dataclass(frozen=True)
class Row:
    """One after the other."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Either:
    """One of them."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Times:
    """So many times; most: None is without end."""

    part: Node
    least: int
    most: int | None


Node = Chars | Row | Either | Times
ANYTHING = Times(Chars(ALL), 0, None)


def read_pattern(pattern: str, path: Path) -> list[Row]:
    """The alternatives of a pattern, each whole: where it is not anchored, anything may stand before or after it."""
    if len(pattern) > MAX_PATTERN:
        raise SchemaRefused(path, f"a pattern of more than {MAX_PATTERN:,} characters")
    reader = _PatternReader(pattern, path)
    found = reader.alternatives()
    if reader.at < len(pattern):
        raise SchemaRefused(path, "a ) without its (")
    return [_whole(row, path) for row in found]


def width(node: Node) -> tuple[int, int | None]:
    """The least and the most characters of it."""
    if isinstance(node, Chars):
        return 1, 1
    if isinstance(node, Times):
        least, most = width(node.part)
        if most == 0 or node.most == 0:
            return 0, 0
        return least * node.least, None if most is None or node.most is None else most * node.most
    sizes = [width(part) for part in node.parts]
    if isinstance(node, Row):
        return sum(low for low, _ in sizes), _sum(high for _, high in sizes)
    highs = [high for _, high in sizes]
    return min(low for low, _ in sizes), None if None in highs else max(high for high in highs if high is not None)


def within(row: Row, least: int, most: int | None, path: Path) -> Row | None:
    """The same with so many characters only; None: there are none. Raises SchemaRefused: they can't be counted."""
    low, high = width(row)
    if low >= least and (most is None or (high is not None and high <= most)):
        return row
    if (most is not None and low > most) or (high is not None and high < least):
        return None
    loose = [at for at, part in enumerate(row.parts) if len(set(width(part))) > 1]
    free = next((at for at in loose if row.parts[at] is ANYTHING), None)
    if len(loose) > 1 and free is not None:  # a search may start at the start
        return within(Row((*row.parts[:free], *row.parts[free + 1 :])), least, most, path)
    at = loose[0]
    part = row.parts[at]
    if len(loose) > 1 or not isinstance(part, Times) or width(part.part) != (1, 1):
        raise SchemaRefused(
            path, "together with minLength or maxLength, can't be held: give the lengths in the pattern"
        )
    fixed = sum(width(other)[0] for place, other in enumerate(row.parts) if place != at)
    bounds = [end - fixed for end in (most,) if end is not None] + [end for end in (part.most,) if end is not None]
    tight = Times(part.part, max(part.least, least - fixed), min(bounds, default=None))
    return Row((*row.parts[:at], tight, *row.parts[at + 1 :]))


def not_empty(node: Node) -> Node:
    """What it writes but nothing, for a node that may write nothing: a grammar can't repeat that without end."""
    if isinstance(node, Times):
        inner = not_empty(node.part) if width(node.part)[0] == 0 else node.part
        more = None if node.most is None else max(node.most - 1, 0)
        return NOWHERE if node.most == 0 else Row((inner, Times(inner, 0, more)))
    if isinstance(node, Either):
        return Either(tuple(not_empty(part) if width(part)[0] == 0 else part for part in node.parts))
    assert isinstance(node, Row)
    ways = [Row((not_empty(part), *node.parts[at + 1 :])) for at, part in enumerate(node.parts)]
    return Either(tuple(ways)) if ways else NOWHERE


NOWHERE = Chars(())  # no character at all


def _sum(sizes: Iterable[int | None]) -> int | None:
    total = 0
    for size in sizes:
        if size is None:
            return None
        total += size
    return total


class _Anchor(Row):
    """^ or $: it stands for itself until the ends of alternatives are looked at."""


START, END = _Anchor(()), _Anchor(())


def _whole(node: Row, path: Path) -> Row:
    """Free ends where there are no anchors."""
    parts = list(node.parts)
    started = bool(parts) and parts[0] is START
    ended = bool(parts) and parts[-1] is END
    inner = parts[1 if started else 0 : len(parts) - 1 if ended else len(parts)]
    if any(_has_anchor(part) for part in inner):
        raise SchemaRefused(path, "^ and $ are held at the ends of a pattern only")
    return Row((*(() if started else (ANYTHING,)), *inner, *(() if ended else (ANYTHING,))))


def _has_anchor(node: Node) -> bool:
    if isinstance(node, _Anchor):
        return True
    if isinstance(node, Times):
        return _has_anchor(node.part)
    return isinstance(node, Row | Either) and any(_has_anchor(part) for part in node.parts)


class _PatternReader:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str, path: Path) -> None:
        self.at = 0
        self._text, self._path = pattern, path

    def alternatives(self) -> list[Row]:
        """Up to the end, or to a ) that is left to the caller. A group that is all of one is opened up."""
        found: list[Row] = []
        while True:
            row = self._row()
            group = row.parts[0] if len(row.parts) == 1 else None
            found += [part for part in group.parts if isinstance(part, Row)] if isinstance(group, Either) else [row]
            if self._next() != "|":
                return found
            self.at += 1

    def _next(self) -> str:
        return self._text[self.at : self.at + 1]

    def _row(self) -> Row:
        parts: list[Node] = []
        while self._next() not in ("", "|", ")"):
            atom = self._atom()
            parts.append(atom if isinstance(atom, _Anchor) else self._counted(atom))
        return Row(tuple(parts))

    def _counted(self, atom: Node) -> Node:
        sign = self._next()
        simple = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if sign in simple and sign:
            self.at += 1
            least, most = simple[sign]
        else:
            match = _COUNTED.match(self._text, self.at)
            if match is None:
                if self._text.startswith("{,", self.at):
                    raise self._refused("readers differ on {,}: write {0,}")
                return atom
            self.at = match.end()
            least = int(match[1])
            most = int(match[3]) if match[3] else None if match[2] else least
            if most is not None and most < least:
                raise self._refused("a repetition whose most is less than its least")
        if self._next() in ("?", "+") and self._next():  # as few as can be: the same texts
            if self._next() == "+":
                raise self._refused("readers differ on a + after a repetition")
            self.at += 1
        if (self._next() in ("*", "+", "?") and self._next()) or _COUNTED.match(self._text, self.at):
            raise self._refused("a repetition of a repetition")
        return Times(atom, least, most)

    def _atom(self) -> Node:
        sign = self._next()
        if sign == "(":
            return self._group()
        if sign == "[":
            return Chars(self._class())
        self.at += 1
        if sign == "^":
            return START
        if sign == "$":
            return END
        if sign == ".":
            return Chars(NO_LINE_END)
        if sign == "\\":
            return Chars(self._escape())
        if sign in ("*", "+", "?"):
            raise self._refused("a repetition of nothing")
        return Chars(((ord(sign), ord(sign)),))

    def _group(self) -> Node:
        if self._text.startswith(AROUND, self.at):
            raise self._refused("what looks ahead or behind can't be held")
        named = re.compile(r"\(\?<[A-Za-z_]\w*>").match(self._text, self.at)
        if named is not None:
            raise self._refused("readers differ on named groups: leave the name out")
        self.at += 3 if self._text.startswith("(?:", self.at) else 1
        if self._next() == "?":
            raise self._refused("flags and other (? groups can't be held")
        found = self.alternatives()
        if self._next() != ")":
            raise self._refused("a ( without its )")
        self.at += 1
        return Either(tuple(found))

    def _class(self) -> Ranges:
        self.at += 1
        negated = self._next() == "^"
        self.at += negated
        found: list[tuple[int, int]] = []
        outside: list[Ranges] = []  # of negated classes: what is surely in none of them
        if self._next() == "]":
            raise self._refused("readers differ on an empty class")
        while self._next() != "]":
            named = self._text[self.at + 1 : self.at + 2] if self._next() == "\\" else ""
            low = self._member()
            if self._next() == "-" and self._text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                low = self._range(low, self._member())
            elif negated and named and named in CLASSES:
                outside.append(CLASSES[named.swapcase()])
                continue
            found += low
        self.at += 1
        if not negated:
            return _sorted(found)
        kept = _complement(found)
        for ranges in outside:
            kept = _common(kept, ranges)
        return kept

    def _range(self, low: Ranges, high: Ranges) -> Ranges:
        (first, last), (end, end_last) = low[0], high[0]
        if len(low) != 1 or len(high) != 1 or first != last or end != end_last:
            raise self._refused("a range with a class at its end")
        if end < first:
            raise self._refused("a range whose end comes before its start")
        return ((first, end),)

    def _member(self) -> Ranges:
        sign = self._next()
        if not sign:
            raise self._refused("a [ without its ]")
        self.at += 1
        if sign == "\\":
            return self._escape()
        if sign in "&~|-" and self._next() == sign:
            raise self._refused("readers differ on doubled signs in a class: put a \\ before them")
        return ((ord(sign), ord(sign)),)

    def _escape(self) -> Ranges:
        sign = self._next()
        self.at += 1
        if sign in CLASSES and sign:
            return CLASSES[sign]
        if sign in CONTROLS and sign:
            return ((CONTROLS[sign], CONTROLS[sign]),)
        for letter, digits in (("x", 2), ("u", 4)):
            match = re.compile(f"[0-9A-Fa-f]{{{digits}}}").match(self._text, self.at)
            if sign == letter and match is not None:
                self.at = match.end()
                return ((int(match[0], 16), int(match[0], 16)),)
        if sign and sign.isascii() and not sign.isalnum() and sign != "_":
            return ((ord(sign), ord(sign)),)
        raise self._refused(f"\\{sign} can't be held" if sign else "a \\ at its end")

    def _refused(self, why: str) -> SchemaRefused:
        return SchemaRefused(self._path, f"at {self.at}: {why}")


def _sorted(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """In order, those that touch joined, without surrogates, which are no characters."""
    found: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if found and low <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        else:
            found.append((low, high))
    cut = [(max(low, first), min(high, last)) for low, high in found for first, last in ALL]
    return tuple((low, high) for low, high in cut if low <= high)


def _common(first: Ranges, second: Ranges) -> Ranges:
    both = ((max(low, start), min(high, end)) for low, high in first for start, end in second)
    return tuple((low, high) for low, high in both if low <= high)


def _complement(ranges: Iterable[tuple[int, int]]) -> Ranges:
    found, start = [], 0
    for low, high in _sorted(ranges):
        if low > start:
            found.append((start, low - 1))
        start = high + 1
    return _sorted([*found, (start, LAST)] if start <= LAST else found)
