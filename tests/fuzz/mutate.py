"""Input from valid seeds: bytes changed blindly, and documents changed by their structure, both from one seeded random.

In: seeds, the form that they have. Out: one damaged input after the other. Which of them taught something is told back
with `keep`, and they become seeds themselves.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any, Literal

import yaml

from tests.fuzz.seeds import dumped

Form = Literal["json", "yaml", "lines", "safetensors", "gguf", "card"]
MAX_BYTES = 6_000
MAX_KEPT = 400
MAX_KEPT_BYTES = 800

DEEP: list[Any] = []
for _ in range(110):
    DEEP = [DEEP]
NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 255, 2**31, 2**32 - 1, 2**53, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.5, -0.0,
    1e308, 1e-320, float("nan"), float("inf"), "", "a", "0", "NaN", "../../etc/passwd", "/etc/passwd", "/dev/zero",
    "pipe", "link", "circle", "deep/../../x", "~nobody-here/x", "a\0b", "\ud800", "\udfff\ud800", "\u202e", "\x1b[2J",
    "x" * 300, "é" * 100, "a/" * 200, ".", "..", "{}", "2026-01-01", "(" * 200, "a{99999999999}",
    [], {}, [[]], [None], {"": None}, {"a": {"b": 1}}, {"$ref": "http://192.0.2.1/x"}, {"$ref": "#"}, [0] * 100, DEEP,
]  # fmt: skip
VALUES = [json.dumps(value) for value in NASTY]
NAMES = [str(value)[:400] for value in NASTY]
TOKENS: dict[str, tuple[bytes, ...]] = {
    "json": (b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0000", b"\\ud800", b"null", b"NaN", b"-Infinity",
             b"1e999", b"-0", b"9" * 5000, b"\xff", b"\xef\xbb\xbf", b"\x00", b"[" * 2000, b'{"a":' * 1000),
    "yaml": (b"&a ", b"*a", b"*b", b"<<: *a", b"? ", b"- ", b": ", b"{", b"}", b"[", b"]", b"|\n", b">\n", b"'", b'"',
             b"!!binary ", b"!!int ", b"!!bool ", b"!!timestamp ", b"!!python/object/apply:os.system [x]", b"!!set {",
             b"%YAML 1.1\n---\n", b"%TAG ! x\n", b"---\n", b"...\n", b'"\\UFFFFFFFF"', b'"\\ud800"', b'"\\x"', b".nan",
             b"-.inf", b"0x", b"0b", b"0o8", b"1:59:59", b"1" + b":0" * 100, b"2026-99-99", b"9" * 200, b"\t", b"\xff",
             b"0001-01-01T00:00:00+23:59", b"\xef\xbb\xbf", b"\x00", b"\xc2\x85", b"#", b"[" * 60, b"- " * 60),
    "binary": tuple(
        struct.pack(layout, number)
        for layout in ("<I", "<Q")
        for number in (0, 1, 2, 3, 8, 9, 12, 2**31 - 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
        if number < 2**32 or layout == "<Q"
    ),
}  # fmt: skip
KINDS: dict[Form, tuple[str, ...]] = {
    "json": ("json",), "lines": ("json",), "safetensors": ("json", "binary"), "gguf": ("binary",), "yaml": ("yaml",),
    "card": ("yaml",),
}  # fmt: skip


class Mutator:
    """An endless source of damaged input; the same seed gives the same inputs if it is told the same."""

    def __init__(self, seeds: list[bytes], form: Form, seed: str) -> None:
        self._seeds, self._kept, self._form = seeds, list(seeds), form
        self._documents = [json.dumps(_document(raw, form)) for raw in seeds]
        self._random = random.Random(seed)
        self._tokens = [token for kind in KINDS[form] for token in TOKENS[kind]]

    def keep(self, data: bytes) -> None:
        """Go on from this input too: it led to something that no other had led to."""
        if len(self._kept) < MAX_KEPT and len(data) <= MAX_KEPT_BYTES:
            self._kept.append(data)

    def next(self) -> bytes:
        """One more input, of at most MAX_BYTES."""
        if self._form != "gguf" and self._random.random() < 0.5:
            return self._structured()[:MAX_BYTES]
        data = bytearray(self._random.choice(self._kept))
        for _ in range(1 << self._random.randrange(4)):
            self._change(data)
        return bytes(data[:MAX_BYTES])

    def _change(self, data: bytearray) -> None:
        rand = self._random
        start = rand.randrange(len(data) + 1)
        stop = min(len(data), start + 1 + int(rand.expovariate(0.1)))
        kind = rand.randrange(9)
        if kind == 0:
            del data[start:stop]
        elif kind == 1:
            data[start:start] = data[start:stop]
        elif kind == 2:
            data[start:start] = rand.choice(self._tokens)
        elif kind == 3:
            token = rand.choice(self._tokens)
            data[start : start + len(token)] = token
        elif kind == 4 and data:
            data[start % len(data)] ^= 1 << rand.randrange(8)
        elif kind == 5 and data:
            data[start % len(data)] = rand.choice((0, 1, 0x7F, 0x80, 0xFF, 32, 10, rand.randrange(256)))
        elif kind == 6:
            other = rand.choice(self._kept)
            begin = rand.randrange(len(other) + 1)
            data[start:stop] = other[begin : begin + rand.randrange(1, 60)]
        elif kind == 7:
            data[start:start] = data[start:stop] * rand.choice((2, 10, 100))
        elif rand.random() < 0.2:
            del data[start:]

    def _structured(self) -> bytes:
        number = self._random.randrange(len(self._seeds))
        raw, data = self._seeds[number], self._changed(json.loads(self._documents[number]))
        if self._form == "safetensors":
            header = dumped(data)
            return struct.pack("<Q", len(header)) + header + raw[8 + struct.unpack("<Q", raw[:8])[0] :]
        if self._form == "lines":
            return b"\n".join(map(dumped, data))
        return b"---\n" + dumped(data) + b"\n---\n" if self._form == "card" else dumped(data)

    def _changed(self, data: Any) -> Any:
        for _ in range(1 << self._random.randrange(3)):
            places = list(_places(data))
            if not places:
                break
            parent, key = self._random.choice(places)
            self._change_value(parent, key)
        return data

    def _change_value(self, parent: Any, key: Any) -> None:
        rand = self._random
        operations: list[Callable[[], object]] = [
            lambda: parent.__setitem__(key, json.loads(rand.choice(VALUES))),
            lambda: parent.__setitem__(key, json.loads(rand.choice(VALUES))),
            lambda: parent.__delitem__(key),
            lambda: parent.__setitem__(key, [parent[key]]),
            lambda: parent.__setitem__(key, {rand.choice(NAMES): parent[key]}),
            lambda: parent.__setitem__(key, _more(parent[key], rand.choice((2, 50)))),
            lambda: parent.update({rand.choice(NAMES): parent[key]})
            if isinstance(parent, dict)
            else parent.append(parent[key]),
        ]  # fmt: skip
        rand.choice(operations)()


def _document(raw: bytes, form: Form) -> Any:
    """The plain data in a seed; of GGUF there is none."""
    if form == "gguf":
        return None
    if form == "safetensors":
        return json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    if form == "lines":
        return [json.loads(line) for line in raw.splitlines()]
    return yaml.safe_load(raw.split(b"---\n")[1] if form == "card" else raw)


def _more(value: Any, times: int) -> Any:
    return value * times if isinstance(value, list | str) else [value] * times


def _places(data: Any) -> Any:
    """(container, key) of everything in a document, but not down to what is nested for its own sake."""
    todo = [(data, 0)]
    while todo:
        item, depth = todo.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        for key in list(keys)[:40]:
            yield item, key
            if depth < 8:
                todo.append((item[key], depth + 1))
