"""quantize lock RECIPE"""

from __future__ import annotations

from pathlib import Path

import click

from quantize.build.lockfile import Lock, LockDifference, differences, lock_path, make_lock, read_lock, write_lock
from quantize.cli.common import (
    json_option,
    make_limits,
    open_cache,
    open_recipe,
    print_json,
    quiet_option,
    verbose_option,
)
from quantize.cli.progress import console_reporter
from quantize.errors import UsageError
from quantize.store.store import Store
from quantize.store.workspace import Workspace


@click.command("lock")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--device", default="cpu", show_default=True, help="cpu, or cuda[:N]: that it is to be built on."
)
@json_option
@quiet_option
@verbose_option
def command(recipe: Path, device: str, as_json: bool, quiet: bool) -> None:
    """Write RECIPE.lock: the source's commit and file hashes, the calibration text by its token ids, each variant's
    options, tool versions and build key. `quantize build --locked` refuses anything else.
    """
    parsed, limits = open_recipe(recipe), make_limits(None, device, None)
    path = lock_path(parsed.path)
    with console_reporter(quiet=quiet or as_json) as reporter:
        lock = make_lock(parsed, Workspace(Store(), open_cache(), reporter), limits.device)
    before = _before(path)
    changes = differences(before, lock) if before is not None else []
    write_lock(path, lock)
    if as_json:
        data = [item.__dict__ for item in changes]
        print_json({"lock": str(path), "digest": lock.digest, "variants": [*lock.variants], "changes": data})
        return
    for item in changes:
        click.echo(_line(item))
    word = "written" if before is None else "changed" if changes else "unchanged"
    click.echo(f"{path}: {word} ({len(lock.variants)} variants, {lock.digest})")


def _before(path: Path) -> Lock | None:
    try:
        return read_lock(path)
    except UsageError:
        return None


def _line(item: LockDifference) -> str:
    return f"{item.what}: {'nothing' if item.locked is None else item.locked} -> {item.now}"
