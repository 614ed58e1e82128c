"""Counts the calls of a client's script: which were answered as they should be. Needs nothing but Python."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

PLAIN, TOOLS = (
    os.environ.get("PLAIN_URL", ""),
    os.environ.get("TOOLS_URL", ""),
)  # the same model; with a tools' template
KEY, MODEL = os.environ.get("CLIENT_KEY", "none"), os.environ.get("CLIENT_MODEL", "smollm2-135m/q8_0")
QUESTION = "What is the capital of France?"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Hanoi", "Paris"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}

_done: list[dict[str, Any]] = []


def call(name: str, work: Callable[[], Any]) -> Any:
    """Do one call; `work` asserts what it must. What it returns is given on, None where it failed."""
    try:
        value = work()
    except Exception as exc:  # noqa: BLE001 - whatever a client raises is what is counted here
        traceback.print_exc()
        _done.append({"call": name, "ok": False, "said": f"{type(exc).__name__}: {exc}"[:300]})
        return None
    _done.append({"call": name, "ok": True})
    return value


def refused(name: str, field: str, work: Callable[[], Any]) -> None:
    """A call for what the engine can't do must be told so, with the field's name."""

    def must_refuse() -> None:
        try:
            work()
        except Exception as exc:  # noqa: BLE001 - see above
            said = str(exc)
        else:
            said = "it was not refused"
        assert field in said, said

    call(name, must_refuse)


def report(client: str) -> None:
    """Print what happened as JSON and end."""
    print(json.dumps({"client": client, "calls": _done}))
    sys.exit(0 if all(item["ok"] for item in _done) else 1)
