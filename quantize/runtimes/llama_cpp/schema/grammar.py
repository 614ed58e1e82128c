"""A context-free grammar, put together rule by rule, and written as llama.cpp's GBNF.

In: characters, literals, choices, repetitions. Out: the text of a grammar in which every rule can come to an end. A
repetition with large bounds costs as many rules as they have binary digits, not as many as they count.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from quantize.runtimes.llama_cpp.schema.refused import SchemaRefused

Item = str  # a terminal, "literal" or [characters], or the name of a rule
Ranges = Sequence[tuple[int, int]]
EMPTY: tuple[Item, ...] = ()
MAX_PARTS = 1_500_000  # characters and references: llama.cpp has 8 bytes for each
MAX_CHAIN = 2048
SIMPLE = frozenset(range(0x30, 0x3A)) | frozenset(range(0x41, 0x5B)) | frozenset(range(0x61, 0x7B))


class Grammar:
    """Rules by name; the same rule is made once."""

    def __init__(self) -> None:
        self._rules: dict[str, tuple[tuple[Item, ...], ...]] = {}
        self._known: dict[tuple[tuple[Item, ...], ...], str] = {}
        self._counted: dict[tuple[Item, int], str] = {}
        self._parts = 0

    def reserve(self) -> Item:
        """A rule that is yet to be defined, so that others can refer to it."""
        name = f"r{len(self._rules)}"
        self._rules[name] = ()
        return name

    def define(self, name: Item, alternatives: Iterable[Sequence[Item]]) -> None:
        """Say what a reserved rule is. Raises SchemaRefused: the grammar is too large."""
        rule = tuple(dict.fromkeys(tuple(item) for item in alternatives))
        self._parts += sum(len(item) if _is_terminal(item) else 1 for row in rule for item in row) + len(rule)
        if self._parts > MAX_PARTS:
            raise SchemaRefused((), f"its grammar has more than {MAX_PARTS:,} parts")
        self._rules[name] = rule

    def rule(self, *alternatives: Sequence[Item]) -> Item:
        """A rule of these alternatives. Without any it is one that nothing fits."""
        found = tuple(dict.fromkeys(tuple(item) for item in alternatives))
        if len(found) == 1 and len(found[0]) == 1:
            return found[0][0]
        name = self._known.get(found)
        if name is None:
            name = self._known[found] = self.reserve()
            self.define(name, found)
        return name

    def optional(self, item: Item) -> Item:
        """It, or nothing."""
        return self.rule((item,), EMPTY)

    def repeat(self, item: Item, least: int, most: int | None) -> Item:
        """So many times; most: None is as often as it likes."""
        return self.rule((*self._exactly(item, least), self._any_more(item, None if most is None else most - least)))

    def _exactly(self, item: Item, count: int) -> list[Item]:
        """By doubling: of each power of two that the count has, one."""
        parts, power = [], item
        while count > 0:
            if count % 2:
                parts.append(power)
            count //= 2
            power = self.rule((power, power)) if count else power
        return parts

    def _any_more(self, item: Item, most: int | None) -> Item:
        """Up to `most` more: one after the other, which is fastest to follow; where these are too many, the half
        and up to the rest, or less than the half: each length in one way only.
        """
        if most is None:
            name = self._known.get((("*", item),))
            if name is None:
                name = self._known[(("*", item),)] = self.reserve()
                self.define(name, ((item, name), EMPTY))
            return name
        if most <= 0:
            return self.rule(EMPTY) if most == 0 else self.rule()
        if most <= MAX_CHAIN:
            chain = EMPTY
            for _ in range(most):
                chain = (self.rule((item, *chain), EMPTY),)
            return chain[0]
        known = self._counted.get((item, most))
        if known is None:
            half = (most + 1) // 2
            more, less = self._any_more(item, most - half), self._any_more(item, half - 1)
            known = self._counted[item, most] = self.rule((*self._exactly(item, half), more), (less,))
        return known

    def one_of(self, texts: Iterable[str]) -> Item:
        """One of these texts. As a tree of their beginnings: llama.cpp would follow every text at each step."""
        ordered = sorted(set(texts))
        root = self.reserve()
        todo = [(root, 0, len(ordered), 0)]
        while todo:
            name, start, stop, depth = todo.pop()
            alternatives: list[tuple[Item, ...]] = []
            at = start
            if at < stop and len(ordered[at]) == depth:
                alternatives.append(EMPTY)
                at += 1
            while at < stop:
                end = bisect_left(ordered, ordered[at][: depth + 1] + "\U0010ffff", at, stop)
                end = max(end, at + 1)
                common = _common_length(ordered[at], ordered[end - 1])
                head = literal(ordered[at][depth:common])
                if end - at == 1:
                    alternatives.append((head,))
                else:
                    below = self.reserve()
                    todo.append((below, at, end, common))
                    alternatives.append((head, below))
                at = end
            self.define(name, alternatives)
        return root

    def text(self, root: Item) -> str:
        """GBNF. Raises SchemaRefused: nothing fits it. What can't come to an end is left out: it would be a trap."""
        ending = self._ending()
        if not _is_terminal(root) and root not in ending:
            raise SchemaRefused((), "no value that comes to an end fits it")
        lines, todo, seen = [f"root ::= {root}"], [root], {root}
        while todo:
            name = todo.pop()
            if _is_terminal(name):
                continue
            kept = [rule for rule in self._rules[name] if all(_is_terminal(item) or item in ending for item in rule)]
            lines.append(f"{name} ::= " + " | ".join(" ".join(rule) or '""' for rule in kept))
            below = [item for rule in kept for item in rule if item not in seen]
            seen.update(below)
            todo += dict.fromkeys(below)
        return "\n".join(lines) + "\n"

    def _ending(self) -> set[str]:
        """Rules from which some text comes to an end."""
        users: dict[str, list[str]] = {}
        for name, rules in self._rules.items():
            for item in {item for rule in rules for item in rule}:
                users.setdefault(item, []).append(name)
        ending: set[str] = set()
        todo = list(self._rules)
        while todo:
            name = todo.pop()
            if name not in ending and any(
                all(_is_terminal(item) or item in ending for item in rule) for rule in self._rules[name]
            ):
                ending.add(name)
                todo += users.get(name, ())
        return ending


def literal(text: str) -> Item:
    """This text."""
    return '"' + "".join(_LITERAL.get(character, character) for character in text) + '"'


def characters(ranges: Ranges) -> Item:
    """One character of these ranges."""
    parts = (_escaped(low) if low == high else f"{_escaped(low)}-{_escaped(high)}" for low, high in ranges)
    return f"[{''.join(parts)}]"


_LITERAL = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\0": "\\x00"}


def _escaped(code: int) -> str:
    if code in SIMPLE:
        return chr(code)
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _is_terminal(item: Item) -> bool:
    return item[0] in '"['


def _common_length(first: str, second: str) -> int:
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
