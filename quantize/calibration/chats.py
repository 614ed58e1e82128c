"""Chats of calibration rows -> token ids, by the model's own chat template.

In: a Chat and the model's tokenizer. Out: ids; what was done to make the template take the chat is counted. Templates
are programs: one that refuses a chat ends in RecipeError with the row's place and the template's own words.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from quantize.calibration.datasets.base import Chat, Message
from quantize.errors import PlanError, RecipeError, first_line

THINKING = ("reasoning_content", "thinking", "reasoning")
MARK = "quantize-asks"


class ChatWriter:
    """Writes chats as the model sees them. folded: chats whose system message went into the user's."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.folded = 0

    def ids(self, chat: Chat) -> list[int]:
        """Token ids of a chat.

        Raises RecipeError: the template refuses it. PlanError: the model has no template, and the chat is no text.
        """
        if self._tokenizer.chat_template is None:
            if chat.plain is None:
                hint = "use a text column"
                raise PlanError("calibration has chat rows, and the model has no chat template", hint=hint)
            ids: list[int] = self._tokenizer(chat.plain)["input_ids"]
            return ids
        messages = [self._fitted(message) for message in chat.messages]
        try:
            return self._rendered(messages, chat.tools)
        except Exception as exc:
            folded = with_system_folded(messages)
            if folded is None:
                raise _refused(chat, exc) from exc
        try:
            found = self._rendered(folded, chat.tools)
        except Exception as exc:
            raise _refused(chat, exc) from exc
        self.folded += 1
        return found

    def _fitted(self, message: Message) -> Message:
        """A message with its thinking under the name that the template reads, and the roles that it knows."""
        known = {key: value for key, value in message.items() if key not in THINKING}
        thought = next((message[key] for key in THINKING if message.get(key)), None)
        name = next((key for key in THINKING if key in self._template), None)
        if thought is not None and name is not None:
            known[name] = thought
        if known["role"] == "developer" and "developer" not in self._template:
            known["role"] = "system"
        return known

    def _rendered(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[int]:
        if self._takes_parts:
            messages = [{**item, "content": _parts(item["content"])} for item in messages]
        ids: list[int] = self._tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=True, return_dict=False
        )
        return ids

    @cached_property
    def _template(self) -> str:
        found = self._tokenizer.chat_template
        return "\n".join(map(str, found.values())) if isinstance(found, dict) else str(found)

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template reads content as a list of parts only, and drops a plain text without a word."""
        return not self._shows(MARK) and self._shows(_parts(MARK))

    def _shows(self, content: Any) -> bool:
        try:
            asked = [{"role": "user", "content": content}]
            return MARK in self._tokenizer.apply_chat_template(asked, tokenize=False)
        except Exception:  # noqa: BLE001 - then it does not take this form
            return False


def with_system_folded(messages: Sequence[Message]) -> list[Message] | None:
    """The messages with the system's text before the first user's; None where there are not both."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    text = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{**messages[1], "content": text}, *messages[2:]]


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _refused(chat: Chat, exc: Exception) -> RecipeError:
    roles = ", ".join(str(item["role"]) for item in chat.messages[:6])
    return RecipeError(
        f"{chat.where}: the model's chat template refuses the row: {first_line(exc)}",
        hint=f"mend the row or leave it out; its roles are: {roles}",
    )
