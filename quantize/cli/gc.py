"""quantize gc"""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from quantize.cli.common import json_option, print_json, store_option, verbose_option
from quantize.cli.table import Column, print_table, wide_option
from quantize.store.store import Store
from quantize.system.sizes import size_text


@click.command("gc")
@click.option("--delete", is_flag=True, help="Remove what is shown; without it nothing is touched.")
@click.option("--newer", is_flag=True, help="Builds of yours too that an older, pulled one has replaced.")
@store_option
@wide_option
@json_option
@verbose_option
def command(delete: bool, newer: bool, store: Store, as_json: bool) -> None:
    """Show, or with --delete remove, superseded artifacts, broken folders and what killed builds left behind.

    The current artifact of a variant, and any that artifacts.lock pins, are never removed; a build of yours that is
    newer than the pulled one before it, only with --newer.
    """
    found = [*store.removable(newer=newer), *((folder, "left by a killed build") for folder in store.leftovers())]
    rows = [(folder, reason, _bytes(folder)) for folder, reason in found]
    if delete:
        removable = {folder for folder, _ in store.removable(newer=newer)}
        for folder, _, _ in rows:
            if folder in removable:
                store.remove(folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        print_json([{"folder": str(f), "reason": r, "size_bytes": s, "removed": delete} for f, r, s in rows])
        return
    table = [[str(folder), reason, size_text(size)] for folder, reason, size in rows]
    print_table([Column("FOLDER"), Column("WHY"), Column("SIZE", "right")], table, empty="nothing to remove")
    for item in [] if newer else store.newer_than_pulled():
        click.echo(f"kept: {item.folder}: built here, and newer than the pulled one that is current; see --newer")
    if rows:
        total = size_text(sum(size for _, _, size in rows))
        click.echo(f"{total} removed" if delete else f"{total} would be removed; run again with --delete")


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
