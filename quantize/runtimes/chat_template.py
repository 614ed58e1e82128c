"""A chat template as models carry it: Jinja text in, with messages; the prompt out.

The environment is the one that transformers gives its templates, sandboxed: a template comes with the model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantize.errors import first_line
from quantize.runtimes.served import Refused

if TYPE_CHECKING:
    import jinja2

CODE = "chat_template"
MAX_MESSAGE = 200  # characters of what a template says


class ChatTemplate:
    """Renders conversations. `tokens` are the names that a template may use: bos_token, eos_token.

    A template may do anything but leave its sandbox: it may fail in any way, take for ever or all memory. Where it
    isn't trusted, it is compiled and rendered in a process of its own.
    """

    def __init__(self, text: str, tokens: Mapping[str, Any]) -> None:
        """Raises Refused: the template can't be compiled."""
        from jinja2 import BaseLoader, TemplateSyntaxError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            loader=BaseLoader(), trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_tag()]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = time.strftime
        try:
            self._template: jinja2.Template = environment.from_string(text)
        except Exception as exc:
            line = f"line {exc.lineno}: " if isinstance(exc, TemplateSyntaxError) else ""
            raise Refused(422, CODE, f"the model's chat template can't be compiled: {line}{_said(exc)}") from exc
        self._tokens = dict(tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt up to where the answer begins. Raises Refused: the template can't take these messages."""
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, tools=list(tools) or None, documents=None, **self._tokens
            )
        except Exception as exc:
            why = str(exc)[:MAX_MESSAGE] if isinstance(exc, _Raised) else f"it does not understand them: {_said(exc)}"
            message = f"the model's chat template refuses these messages: {why}"
            raise Refused(422, CODE, message, "messages") from exc


class _Raised(ValueError):
    """raise_exception was called by the template."""


def _raise(message: str) -> None:
    raise _Raised(message)


def _said(exc: Exception) -> str:
    """What went wrong, in a line."""
    known = {RecursionError: "it calls itself without end", MemoryError: "it takes too much memory"}
    said = known.get(type(exc), f"{type(exc).__name__}: {first_line(exc)}")
    return said[:MAX_MESSAGE]


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    """As transformers has it: jinja's own would write HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _generation_tag() -> type[Any]:
    """`{% generation %}` marks what a trainer learns from; here it means nothing."""
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation
