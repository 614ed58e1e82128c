"""Writes docs/commands.md from the commands' own help: python docs/make_commands.py. A test compares the two."""

from __future__ import annotations

from pathlib import Path

import click

from quantize.cli import COMMANDS, main


def render() -> str:
    """The text of docs/commands.md."""
    parts = [
        "# Commands",
        "Results go to stdout, progress and log to stderr. Exit codes: 0 done; 1 build or run failed;",
    ]
    parts[1] += " 2 wrong usage or recipe; 3 a check refused; 130 interrupted. `-v` adds tracebacks.\n"
    context = click.Context(
        main, info_name="quantize", max_content_width=100, terminal_width=100, **main.context_settings
    )
    for name in COMMANDS:
        command = main.get_command(context, name)
        assert command is not None
        parts.append(_section(command, click.Context(command, parent=context, info_name=name), 2))
    return "\n".join(parts)


def _section(command: click.Command, context: click.Context, level: int) -> str:
    text = f"{'#' * level} {context.command_path}\n\n```\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            text += "\n" + _section(inner, click.Context(inner, parent=context, info_name=name), level + 1)
    return text


if __name__ == "__main__":
    Path(__file__).with_name("commands.md").write_text(render(), encoding="utf-8")
