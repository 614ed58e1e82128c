"""The flags of `quantize serve` that are settings of a served model: made from the fields of Serving, not listed again.

In: Serving, or a kind of it with more fields. Out: options for click, and the settings from what was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import Field, fields
from typing import Any, TypeVar

import click

from quantize.runtimes.served import Flag, Serving

Function = TypeVar("Function", bound=Callable[..., Any])
Settings = TypeVar("Settings", bound=Serving)


def serving_options(settings: type[Serving]) -> Callable[[Function], Function]:
    """An option for each setting that is a flag, in their order. What is not given is None, or has its default."""

    def add(function: Function) -> Function:
        for field, flag in reversed([*_flags(settings)]):
            function = _option(field, flag)(function)
        return function

    return add


def take_serving(settings: type[Settings], flags: dict[str, Any]) -> Settings:
    """The settings that were given, which are taken out of `flags`; the others are as in the class."""
    given = {field.name: flags.pop(_name(field, flag)) for field, flag in _flags(settings)}
    return settings(**{name: value for name, value in given.items() if value is not None})


def _flags(settings: type[Serving]) -> Iterator[tuple[Field[Any], Flag]]:
    for field in fields(settings):
        flag = field.metadata.get("flag")
        if flag is not None:
            yield field, flag


def _name(field: Field[Any], flag: Flag) -> str:
    return flag.name or field.name


def _option(field: Field[Any], flag: Flag) -> Callable[[Function], Function]:
    name = _name(field, flag)
    if isinstance(field.default, bool):
        return click.option(f"--{name.replace('_', '-')}", name, is_flag=True, help=flag.help)
    kind: Any = click.IntRange(min=flag.least) if flag.least is not None else None
    kind = click.Choice(flag.choices) if flag.choices else kind
    default = flag.default or field.default or None
    return click.option(
        f"--{name.replace('_', '-')}", name, type=kind, default=default, show_default=default is not None,
        help=flag.help,
    )  # fmt: skip
