"""One table for all commands: on a terminal as wide as that is, in a pipe or a file as wide as the cells are.

In: columns and rows of text. Out: lines on stdout. What does not fit is wrapped, where it is words or names, and then
left out by rank, and which columns those were is said; a figure is never cut. --wide cuts and leaves out nothing.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])
WIDE = "quantize.wide"  # in the context of a command
GAP = 3  # columns of the terminal between two of the table
LEAST = 12  # a column of words is not made narrower than this, nor than its longest piece if that is shorter
PIECE = re.compile(r"[^\s/_@=-]*[/_@=-]+|[^\s/_@=-]+|\s+")


@dataclass(frozen=True)
class Column:
    """rank: the highest is left out first where there is no room; 0 never is. wraps: cells may go over several lines;
    None: those that are on the left, which are words and names.
    """

    title: str
    side: Literal["left", "right"] = "left"
    rank: int = 0
    wraps: bool | None = None

    @property
    def may_wrap(self) -> bool:
        """Whether its cells may go over several lines."""
        return self.side == "left" if self.wraps is None else self.wraps


def wide_option(function: Function) -> Function:
    """--wide: nothing is wrapped or left out of a table."""

    def keep(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
        context.meta[WIDE] = value

    return click.option(
        "--wide", is_flag=True, expose_value=False, callback=keep, help="Every column, however wide the terminal is."
    )(function)


def terminal_columns() -> int | None:
    """How wide a table may be; None for no limit: --wide, a pipe, a file."""
    context = click.get_current_context(silent=True)
    if not sys.stdout.isatty() or (context is not None and context.meta.get(WIDE)):
        return None
    return shutil.get_terminal_size().columns


def print_markdown(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, empty: str) -> None:
    """Print a Markdown table on stdout."""
    if not rows:
        click.echo(empty)
        return
    sides = ["---:" if column.side == "right" else "---" for column in columns]
    for cells in ([column.title.lower() for column in columns], sides, *rows):
        click.echo("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, empty: str) -> None:
    """Print a table on stdout."""
    if not rows:
        click.echo(empty)
        return
    chosen, widths = fitted(columns, rows, terminal_columns())
    shown = [[cells[index] for index in chosen] for cells in ([item.title for item in columns], *rows)]
    sides = [columns[index].side for index in chosen]
    head, *body = [_lines(row, widths, sides) for row in shown]
    rule = "─" * (sum(widths) + GAP * (len(widths) - 1))
    click.echo("\n".join(["", *head, rule, *(line for lines in body for line in lines), ""]))
    left_out = [item.title for index, item in enumerate(columns) if index not in chosen]
    if left_out:
        click.echo(f"not shown: {', '.join(left_out)} (--wide)\n")


def fitted(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], room: int | None
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Which columns to show, by index, and how wide each is. room: of the terminal; None for no limit."""
    texts = [[column.title, *(row[index] for row in rows)] for index, column in enumerate(columns)]
    full = [max(map(_width, cells)) for cells in texts]
    each = zip(columns, texts, full, strict=True)
    least = [_least(cells) if column.may_wrap else size for column, cells, size in each]
    chosen = list(range(len(columns)))
    while room is not None and _total([least[index] for index in chosen]) > room:
        worst = max(chosen, key=lambda index: (columns[index].rank, index))
        if columns[worst].rank == 0 or len(chosen) == 1:
            break
        chosen.remove(worst)
    widths = [full[index] for index in chosen]
    while room is not None and _total(widths) > room:
        spare = [place for place, index in enumerate(chosen) if widths[place] > least[index]]
        if not spare:
            break
        widths[max(spare, key=lambda place: widths[place])] -= 1
    return chosen, widths


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def _least(cells: Sequence[str]) -> int:
    longest = max((_width(piece) for cell in cells for piece in PIECE.findall(cell)), default=0)
    return max(_width(cells[0]), min(longest, LEAST))


def _width(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)


def _lines(cells: Sequence[str], widths: Sequence[int], sides: Sequence[str]) -> list[str]:
    """One row of the table: as many lines as its cell with the most of them has."""
    wrapped = [wrap(cell, width) for cell, width in zip(cells, widths, strict=True)]
    height = max(map(len, wrapped))
    lines = []
    for number in range(height):
        parts = [lines_[number] if number < len(lines_) else "" for lines_ in wrapped]
        padded = [
            " " * (width - _width(part)) + part if side == "right" else part + " " * (width - _width(part))
            for part, width, side in zip(parts, widths, sides, strict=True)
        ]
        lines.append((" " * GAP).join(padded).rstrip())
    return lines


def wrap(text: str, width: int) -> list[str]:
    """Text in lines of at most `width`: broken at white space, after the signs that join names, else anywhere."""
    lines = [""]
    for piece in PIECE.findall(" ".join(text.splitlines())):
        if _width(lines[-1] + piece.rstrip()) > width:
            if lines[-1].strip():
                lines.append("")
            piece = piece.lstrip()
            while _width(piece) > width:
                cut = max(1, next(at for at in range(len(piece), 0, -1) if at == 1 or _width(piece[:at]) <= width))
                lines[-1], piece = piece[:cut], piece[cut:]
                lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines if line.strip()] or [""]
