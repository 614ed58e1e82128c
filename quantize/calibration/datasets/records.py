"""A row of a table, as people write them -> a text, a chat, or nothing.

In: the columns of a row, which column the spec names, where the row stands. Out: a Row, or RecipeError with the row's
place. Chats come as messages with role and content (OpenAI), as conversations with from and value (sharegpt), or as a
question and its answer in two or three columns. How a model's template writes them is left to calibration.chats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantize.calibration.datasets.base import Chat, Message, Row, no_column
from quantize.errors import RecipeError
from quantize.system.untrusted import parse_json

DEFAULT_COLUMN = "text"
CHAT_COLUMNS = ("messages", "conversations", "conversation")
QUESTIONS = ("prompt", "instruction", "question")
ANSWERS = ("completion", "response", "output", "answer")
BESIDE_QUESTION, SYSTEM, TOOLS = "input", "system", "tools"
KNOWN_COLUMNS = (*CHAT_COLUMNS, *QUESTIONS, *ANSWERS, BESIDE_QUESTION, SYSTEM, TOOLS)
MAX_CHARACTERS = 16 << 20
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "observation": "tool",
         "function": "tool"}  # fmt: skip
CALL = "function_call"  # sharegpt's role of an assistant that calls a tool


def columns_of(names: Sequence[str], column: str) -> list[str]:
    """The columns of a table that `row_of` looks at; none where it would find no row."""
    if column in names:
        return [column, *(name for name in (TOOLS,) if name in names and name != column)]
    return [name for name in KNOWN_COLUMNS if name in names] if column == DEFAULT_COLUMN else []


def row_of(record: object, column: str, where: str) -> Row:
    """What a row holds; None for a row that holds nothing, which is counted and skipped.

    Without `column` in it, and where the spec names none, the other columns say what the row is. where: its file and
    line or number. Raises RecipeError: there is no such column, or what it holds is no text and no chat.
    """
    if record is None:
        return None
    if not isinstance(record, Mapping):
        raise no_column(where, column, [])
    if column in record:
        return _value(record, column, where)
    if column != DEFAULT_COLUMN:
        raise no_column(where, column, list(record))
    for name in CHAT_COLUMNS:
        if name in record:
            return _value(record, name, where)
    question = next((name for name in QUESTIONS if name in record), None)
    answer = next((name for name in ANSWERS if name in record), None)
    if question is None or answer is None:
        raise no_column(where, column, list(record))
    return _answered(record, question, answer, where)


def messages_of(value: Sequence[Any], where: str) -> list[Message]:
    """Messages with role and content, from OpenAI's keys or sharegpt's. Raises RecipeError: one has neither."""
    return [_message(item, where) for item in value if item is not None]


def _value(record: Mapping[str, Any], column: str, where: str) -> Row:
    value = record[column]
    if value is None:
        return None
    if isinstance(value, str) and column in CHAT_COLUMNS:
        value = _chat_in_text(value)
    if isinstance(value, str):
        return _checked(value, where)
    if not isinstance(value, list):
        what = f"{where}: column `{column}` holds neither text nor chat messages, but {type(value).__name__}"
        raise RecipeError(what, hint="mend the row, or leave it out")
    messages = messages_of(value, where)
    return Chat(messages, _tools(record, where), where) if messages else None


def _chat_in_text(value: str) -> Any:
    """The messages of a chat that is kept as JSON in a text; other text stays as it is."""
    found = _parsed(value)
    return found if isinstance(found, list) and all(isinstance(item, Mapping) for item in found) else value


def _answered(record: Mapping[str, Any], question: str, answer: str, where: str) -> Row:
    """A chat of a question and its answer, each a text or messages."""
    asked, given = record[question], record[answer]
    if asked is None or given is None:
        return None
    if isinstance(asked, list) and isinstance(given, list):
        return Chat(messages_of([*asked, *given], where), _tools(record, where), where)
    beside = record.get(BESIDE_QUESTION) or ""
    for name, value in ((question, asked), (answer, given), (BESIDE_QUESTION, beside)):
        if not isinstance(value, str):
            kind = type(value).__name__
            raise RecipeError(f"{where}: column `{name}` holds no text, but {kind}", hint="mend the row")
        _checked(value, where)
    if not (asked.strip() or given.strip() or beside.strip()):
        return None
    text = f"{asked}\n\n{beside}" if beside else asked
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": given}]
    system = record.get(SYSTEM)
    if isinstance(system, str) and system:
        messages.insert(0, {"role": "system", "content": system})
    return Chat(messages, _tools(record, where), where, "\n".join(item["content"] for item in messages))


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise RecipeError(f"{where}: a chat message must be an object", hint=f"found {type(item).__name__}")
    known = {str(key): without_null(value) for key, value in item.items() if value is not None}
    role = known.pop("role", None) or known.pop("from", None)
    if not isinstance(role, str):
        hint = f"a message has `role` and `content`, or `from` and `value`; this one has: {', '.join(known) or 'none'}"
        raise RecipeError(f"{where}: a message without a role", hint=hint)
    known.pop("from", None)
    content = known.pop("content", known.pop("value", ""))
    if role == CALL:
        return {**known, "role": "assistant", **_called(content)}
    if not isinstance(content, str):
        content = _joined(content, where)
    if "tool_calls" in known:
        known["tool_calls"] = [_with_arguments(call) for call in _list(known["tool_calls"])]
    return {"role": ROLES.get(role, role), "content": _checked(content, where), **known}


def _joined(content: Any, where: str) -> str:
    """The text of a list of parts, one after the other."""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RecipeError(f"{where}: a message has a part of type {kind!r}", hint="only text can be read")
        texts.append(text)
    return "".join(texts)


def _called(content: Any) -> dict[str, Any]:
    """A tool call that sharegpt writes as the text of a message, `{name, arguments}`; other text stays as it is."""
    call = _parsed(content)
    if not isinstance(call, Mapping) or "name" not in call:
        return {"content": str(content)}
    return {"content": "", "tool_calls": [_with_arguments({"type": "function", "function": dict(call)})]}


def _with_arguments(call: Any) -> Any:
    """A tool call with its arguments as an object: templates write them as JSON themselves, a text would be quoted."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = _parsed(function.get("arguments"))
    return {**call, "function": {**function, "arguments": {} if arguments is None else arguments}}


def _tools(record: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    """The tools beside a chat: a list, or the text of one, as tables keep what has no fixed columns."""
    found = _parsed(record.get(TOOLS))
    if found is None or found == "":
        return ()
    tools = without_null(found)
    if not isinstance(tools, list) or not all(isinstance(item, dict) for item in tools):
        raise RecipeError(f"{where}: column `{TOOLS}` is no list of tools", hint="mend the row, or leave it out")
    return tuple(tools)


def without_null(value: Any) -> Any:
    """A value without the keys that are null: a table has every key in every row, and templates ask whether one is."""
    if isinstance(value, Mapping):
        return {str(key): without_null(item) for key, item in value.items() if item is not None}
    return [without_null(item) for item in value] if isinstance(value, list) else value


def _parsed(value: Any) -> Any:
    """What a text of JSON holds; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value.encode())
    except ValueError:
        return value


def _list(value: Any) -> list[Any]:
    found = _parsed(value)
    return found if isinstance(found, list) else [found]


def _checked(text: str, where: str) -> str:
    if len(text) > MAX_CHARACTERS:
        hint = f"at most {MAX_CHARACTERS:,} are read: cut it into several rows"
        raise RecipeError(f"{where}: a text of {len(text):,} characters", hint=hint)
    return text
