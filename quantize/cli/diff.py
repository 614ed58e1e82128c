"""quantize diff A B"""

from __future__ import annotations

import click

from quantize.cli.common import json_option, print_json, print_table, store_option, verbose_option
from quantize.formats.diff import Difference, compare
from quantize.store.store import Store


@click.command("diff")
@click.argument("first")
@click.argument("second")
@store_option
@json_option
@verbose_option
def command(first: str, second: str, store: Store, as_json: bool) -> None:
    """Compare two artifacts: settings, tools, source, files, tensor types and sizes."""
    differences = compare(store.find(first), store.find(second))
    if as_json:
        print_json([item.__dict__ for item in differences])
        return
    rows = [_row(item) for item in differences]
    columns = [("WHAT", "left"), ("FIRST", "left"), ("SECOND", "left")]
    print_table(columns, rows, empty="no difference")


def _row(item: Difference) -> list[str]:
    return [item.what, _text(item.first), _text(item.second)]


def _text(value: object) -> str:
    text = "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    return text if len(text) <= 72 else text[:69] + "..."
