"""A chat template as models carry it: Jinja text in, with messages; the prompt out.

The environment is the one that transformers gives its templates, sandboxed: a template comes with the model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantize.runtimes.served import Refused

if TYPE_CHECKING:
    import jinja2


class ChatTemplate:
    """Renders conversations. `tokens` are the names that a template may use: bos_token, eos_token."""

    def __init__(self, text: str, tokens: Mapping[str, str]) -> None:
        from jinja2 import BaseLoader
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            loader=BaseLoader(), trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_tag()]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = time.strftime
        self._template: jinja2.Template = environment.from_string(text)
        self._tokens = dict(tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt up to where the answer begins. Raises Refused: the template can't take these messages."""
        from jinja2 import TemplateError

        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, tools=list(tools) or None, **self._tokens
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as exc:
            why = str(exc)[:200] if isinstance(exc, _Raised) else "it does not understand them"
            message = f"the model's chat template refuses these messages: {why}"
            raise Refused(422, "chat_template", message, "messages") from exc


class _Raised(ValueError):
    """raise_exception was called by the template."""


def _raise(message: str) -> None:
    raise _Raised(message)


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _generation_tag() -> type[Any]:
    """`{% generation %}` marks what a trainer learns from; here it means nothing."""
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation
