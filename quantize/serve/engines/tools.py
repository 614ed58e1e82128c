"""Tool calls of local models: what a model is told of tools, and its text turned back into calls.

In: the chat template's family, a request's tools and its choice, the text of an answer. Out: a ToolWish, and the deltas
of a message. How the model is told is its own chat template's; families differ in how they write a call (TOOL_STYLES).
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from quantize.serve.engines.text import overlap
from quantize.serve.failures import Failure, unsupported
from quantize.serve.protocol import ChatRequest, Tool

ID_LETTERS = string.ascii_letters + string.digits
ID_LENGTH = 9  # Mistral's templates refuse any other


@dataclass(frozen=True)
class ToolStyle:
    """How a family writes a call: JSON with `name` and a key for the arguments, between marks.

    opens, closes: the marks; without them the whole answer is the call. many: a list of calls up to the answer's end.
    lead: what is put at the end of the prompt where a call is a must. hidden: tokens that are shown to read by.
    """

    arguments: str
    opens: str = ""
    closes: str = ""
    many: bool = False
    lead: str = ""
    hidden: tuple[str, ...] = ()


TOOL_STYLES = {
    "hermes": ToolStyle("arguments", "<tool_call>", "</tool_call>", lead="<tool_call>\n",
                        hidden=("<tool_call>", "</tool_call>")),
    "mistral": ToolStyle("arguments", "[TOOL_CALLS]", many=True, lead="[TOOL_CALLS]", hidden=("[TOOL_CALLS]",)),
    "llama3": ToolStyle("parameters"),
}  # fmt: skip


@dataclass(frozen=True)
class ToolWish:
    """What a request wants of tools. forced: it must be a call, of one of `tools`. parallel: more than one may come."""

    style: ToolStyle
    tools: Sequence[Tool]
    forced: bool
    parallel: bool

    def order(self) -> dict[str, Any]:
        """What the model's process is told."""
        shown = [tool.model_dump(exclude_none=True) for tool in self.tools]
        return {"tools": shown, "lead": self.style.lead if self.forced else "", "show": list(self.style.hidden)}

    def schema(self) -> dict[str, Any]:
        """Of an answer that must be a call. References in a tool's schema go on meaning that schema."""
        definitions: dict[str, Any] = {}
        calls = []
        for number, tool in enumerate(self.tools):
            assert tool.function is not None
            given: Any = tool.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}
            if '"$ref"' in json.dumps(given):
                key = f"tool{number}"
                definitions[key] = _rebased(given, f"#/$defs/{key}")
                given = {"$ref": f"#/$defs/{key}"}
            calls.append({
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, self.style.arguments: given},
                "required": ["name", self.style.arguments],
                "additionalProperties": False,
            })  # fmt: skip
        one: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
        whole = {"type": "array", "items": one, "minItems": 1, "maxItems": 1} if self.style.many else one
        return {**whole, "$defs": definitions} if definitions else whole

    def reader(self) -> CallReader:
        """For one answer."""
        names = frozenset(tool.function.name for tool in self.tools if tool.function is not None)
        return CallReader(self.style, names, forced=self.forced, parallel=self.parallel)


def wish_of(request: ChatRequest, style_name: str, *, has_grammar: bool, runtime: str) -> ToolWish | None:
    """What is asked for; None: nothing. Raises Failure: the model can't, or the choice does not fit the tools."""
    choice: Any = request.tool_choice
    if not request.tools:
        if choice not in (None, "none", "auto"):
            raise Failure(422, "invalid_value", "tool_choice: there are no tools to choose from", param="tool_choice")
        return None
    if choice == "none":
        return None
    tools, forced = _chosen(request.tools, choice)
    _check(tools, runtime)
    style = TOOL_STYLES.get(style_name)
    if style is None:
        raise unsupported("tools", runtime, ": the model's chat template has no tool calls that are known here")
    if forced and not has_grammar:
        raise unsupported("tool_choice", runtime, ", which can't force a call: leave it out, or auto")
    strict = any(tool.function is not None and tool.function.strict for tool in tools)
    if strict and not forced:
        raise unsupported("tools", runtime, " with strict, unless tool_choice is required or names a tool")
    if not forced and request.response_format is not None and request.response_format.type != "text":
        why = " beside tools, unless tool_choice is none, required or names a tool"
        raise unsupported("response_format", runtime, why)
    if request.grammar is not None:
        raise Failure(422, "invalid_value", "grammar and tools exclude each other", param="grammar")
    parallel = (request.model_extra or {}).get("parallel_tool_calls")
    return ToolWish(style, tools, forced, parallel is not False)


def _chosen(tools: Sequence[Tool], choice: Any) -> tuple[Sequence[Tool], bool]:
    """The tools that may be called, and whether one must be. Raises Failure: the choice can't be understood."""
    if choice in (None, "auto"):
        return tools, False
    if choice == "required":
        return tools, True
    wrong = Failure(422, "invalid_value", "tool_choice: none, auto, required, or one of the tools", param="tool_choice")
    if not isinstance(choice, Mapping):
        raise wrong
    if choice.get("type") == "allowed_tools" and isinstance(allowed := choice.get("allowed_tools"), Mapping):
        listed, forced = allowed.get("tools"), allowed.get("mode") == "required"
    else:
        listed, forced = [choice], True
    names = {_name(item) for item in listed} if isinstance(listed, list) else set()
    kept = [tool for tool in tools if tool.function is not None and tool.function.name in names]
    if not kept or len(kept) < len(names):
        raise wrong
    return kept, forced


def _name(item: Any) -> Any:
    function = item.get("function") if isinstance(item, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def _check(tools: Sequence[Tool], runtime: str) -> None:
    for tool in tools:
        if tool.type != "function" or tool.function is None:
            raise unsupported("tools", runtime, " of another type than function")


def _rebased(value: Any, root: str) -> Any:
    """A schema with its local references put below `root`."""
    if isinstance(value, list):
        return [_rebased(item, root) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: root + item[1:]
        if key == "$ref" and isinstance(item, str) and item.startswith("#")
        else _rebased(item, root)
        for key, item in value.items()
    }


class CallReader:
    """Reads an answer as it comes: deltas of text, and of whole calls. `calls` counts these."""

    def __init__(self, style: ToolStyle, names: frozenset[str], *, forced: bool, parallel: bool) -> None:
        self._style = style
        self._names = names
        self._parallel = parallel
        self._whole = forced or not style.opens  # no mark to wait for: it is a call, or it is not
        self._inside = forced
        self._held = ""
        self.calls = 0

    def add(self, text: str) -> list[dict[str, Any]]:
        """What is certain by now."""
        self._held += text
        if self._whole:
            if self._inside or not self._held.strip() or self._held.lstrip().startswith("{"):
                return []
            self._whole = False  # it began as text, and goes on as such
        found: list[dict[str, Any]] = []
        while True:
            if not self._inside:
                place = self._held.find(self._style.opens) if self._style.opens else -1
                if place < 0:
                    return found + self._take_text(len(self._held) - overlap(self._held, self._style.opens))
                found += self._take_text(place)
                self._held, self._inside = self._held.partition(self._style.opens)[2], True
            if not self._close(found):
                return found

    def flush(self) -> list[dict[str, Any]]:
        """At the end of the answer: what was begun and is no call was text after all."""
        if self._inside or self._whole:
            calls = self._calls_in(self._held, whole=False)
            if calls is not None:
                return calls
            if self._inside and not self._whole:
                self._held = self._style.opens + self._held
        return [{"content": self._held}] if self._held and (self._held.strip() or not self.calls) else []

    def _take_text(self, length: int) -> list[dict[str, Any]]:
        """The first part of what is held; space is kept until it is known that no call comes after it."""
        text = self._held[:length].rstrip()
        self._held = self._held[len(text) :]
        return [{"content": text}] if text else []

    def _close(self, found: list[dict[str, Any]]) -> bool:
        """Take a call that has come to its end, if it has."""
        place = -1
        while self._style.closes and (place := self._held.find(self._style.closes, place + 1)) >= 0:
            calls = self._calls_in(self._held[:place])
            if calls is not None:
                found += calls
                self._held, self._inside = self._held[place + len(self._style.closes) :], False
                return True
        return False

    def _calls_in(self, text: str, *, whole: bool = True) -> list[dict[str, Any]] | None:
        values = _values(text, whole=whole)
        if values is None:
            return None
        read = [self._read(item) for item in values]
        if not read or any(item is None for item in read):
            return None
        return [delta for item in read if item is not None for delta in self._emit(*item)]

    def _read(self, value: Any) -> tuple[str, str] | None:
        """Name and arguments, as JSON; None: it is no call of a known tool."""
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        given = value.get(self._style.arguments, value.get("arguments", value.get("parameters", {})))
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except ValueError:
                return None
        return (value["name"], orjson.dumps(given).decode()) if isinstance(given, dict) else None

    def _emit(self, name: str, arguments: str) -> Iterator[dict[str, Any]]:
        if self.calls and not self._parallel:
            return
        number, self.calls = self.calls, self.calls + 1
        key = "".join(secrets.choice(ID_LETTERS) for _ in range(ID_LENGTH))
        function = {"name": name, "arguments": arguments}
        yield {"tool_calls": [{"index": number, "id": key, "type": "function", "function": function}]}


def _values(text: str, *, whole: bool) -> list[Any] | None:
    """JSON values of a text: one, a list's, or several after one another. None: there is something else in it."""
    decoder, place = json.JSONDecoder(), 0
    found: list[Any] = []
    while place < len(text):
        if text[place] in " \t\r\n;":
            place += 1
            continue
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return found if found and not whole else None
        found += value if isinstance(value, list) else [value]
    return found or None
