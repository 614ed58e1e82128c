"""Messages of OpenAI's chat API as chat templates take them.

In: a message of a request. Out: a plain dict: role, content as one text, and where a client sent them name, tool calls
with arguments as an object, and the call that a tool answers. Raises Failure for what is no text.
"""

from __future__ import annotations

import json
from typing import Any

from quantize.serve.failures import Failure, field_name, unsupported
from quantize.serve.neutral import says_nothing
from quantize.serve.protocol import Message, TextPart, ToolCall

THOUGHTS = ("reasoning_content", "reasoning")  # what an assistant thought, by the names that servers give it


def template_message(message: Message, runtime: str, *, knows_tools: bool) -> dict[str, Any]:
    """What a template is given. Raises Failure: something in it that the template would not show to the model."""
    if not knows_tools and (message.tool_calls or message.role in ("tool", "function")):
        raise unsupported("messages", runtime, ": the model's chat template has no tool calls that are known here")
    extra = {key: value for key, value in (message.model_extra or {}).items() if not says_nothing(key, value)}
    refusal = extra.pop("refusal", None) if message.role == "assistant" else None
    thoughts = [extra.pop(key) for key in THOUGHTS if message.role == "assistant" and isinstance(extra.get(key), str)]
    if extra:
        raise unsupported("messages", runtime, f": {field_name(next(iter(extra)))} in a message")
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    found: dict[str, Any] = {"role": role, "content": _text(message, runtime) or (refusal or "")}
    if message.name is not None:
        found["name"] = message.name
    if thoughts:
        found["reasoning_content"] = thoughts[0]
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        if role != "assistant":
            raise unsupported("messages", runtime, ": tool_calls of another role than assistant")
        found["tool_calls"] = [_call(item, runtime) for item in message.tool_calls]
    return found


def _text(message: Message, runtime: str) -> str:
    if not isinstance(message.content, list):
        return message.content or ""
    return "".join(_part(part, runtime) for part in message.content)


def _part(part: TextPart, runtime: str) -> str:
    text = part.text if part.type == "text" else (part.model_extra or {}).get("refusal")
    if part.type not in ("text", "refusal") or not isinstance(text, str):
        raise unsupported("messages", runtime, ": content other than text")
    return text


def _call(call: ToolCall, runtime: str) -> dict[str, Any]:
    """Arguments become an object, as templates of all families take them."""
    if call.type != "function" or call.function is None:
        raise unsupported("messages", runtime, ": tool calls of another type than function")
    arguments: Any = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        message = "messages: the arguments of a tool call are not the text of a JSON object"
        raise Failure(422, "invalid_value", message, param="messages")
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
