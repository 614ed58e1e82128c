"""quantize build RECIPE"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantize.backends import formats
from quantize.build import Outcome, RunOptions, build
from quantize.cli.common import (
    json_option,
    limits_options,
    make_limits,
    open_cache,
    print_json,
    print_table,
    quality,
    quiet_option,
    size_text,
    store_option,
    verbose_option,
)
from quantize.cli.progress import console_reporter
from quantize.errors import UsageError
from quantize.evaluate.record import COLUMNS
from quantize.lock import hold, lock_path, read_lock
from quantize.recipe import load_recipe
from quantize.store import Store


@click.command("build")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--only", multiple=True, metavar="VARIANT", help="Build only this variant; may be given several times.")
@click.option("--force", is_flag=True, help="Build again what is up to date.")
@click.option("--keep-intermediates", is_flag=True, help="Keep the 16-bit GGUF file that variants share, in the cache.")
@click.option("--no-eval", is_flag=True, help="Measure nothing: what is built stays `not evaluated`.")
@click.option(
    "--accept-risk", metavar="REASON", help="Take what the gates refuse all the same; the manifest says so, and why."
)
@click.option("--locked", is_flag=True, help="Refuse to build anything but what RECIPE.lock says; see `quantize lock`.")
@click.option(
    "--keep-going/--fail-fast", default=True, help="Go on with other variants after a failure.  [default: go on]"
)
@store_option
@limits_options
@json_option
@quiet_option
@verbose_option
def command(
    recipe: Path, only: tuple[str, ...], force: bool, keep_intermediates: bool, no_eval: bool,
    accept_risk: str | None, locked: bool, keep_going: bool, store: Store, threads: int | None, device: str,
    memory_budget: str | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Build every variant of RECIPE that is not up to date; each is verified, measured against its source, and held to
    the recipe's gates before it counts as built. What the gates refuse is kept aside (exit code 3).
    """
    if accept_risk is not None and not accept_risk.strip():
        raise UsageError("--accept-risk needs a reason", hint='say who knows why: --accept-risk "for load tests only"')
    parsed = load_recipe(recipe, formats())
    limits = make_limits(threads, device, memory_budget)
    run = RunOptions(limits, keep_going, force, only, keep_intermediates, evaluate=not no_eval, accept_risk=accept_risk)
    with console_reporter(quiet=quiet or as_json) as reporter:
        if locked:
            parsed = hold(read_lock(lock_path(recipe)), parsed, open_cache(), reporter, only)
        outcomes = build(parsed, store, open_cache(), reporter, run)
    if as_json:
        print_json([_as_json(item) for item in outcomes])
    else:
        columns = [
            ("VARIANT", "left"),
            ("STATE", "left"),
            ("SIZE", "right"),
            ("SECONDS", "right"),
            *COLUMNS,
            ("ARTIFACT", "left"),
        ]
        print_table(columns, [_row(item) for item in outcomes], empty="nothing to build")
    failed = [item.error for item in outcomes if item.error is not None]
    if failed:
        click.echo(_failures(outcomes), err=True)
        click.get_current_context().exit(max(error.exit_code for error in failed))


def _failures(outcomes: list[Outcome]) -> str:
    failed = [item for item in outcomes if item.error is not None]
    refused = sum(item.state == "refused" for item in failed)
    counts = [f"{len(failed) - refused} failed"] if len(failed) > refused else []
    counts += [f"{refused} refused"] if refused else []
    return f"of {len(outcomes)} variants {' and '.join(counts)}; first: {failed[0].error}"


def _row(item: Outcome) -> list[str]:
    seconds = f"{item.seconds:.1f}" if item.seconds else ""
    if item.artifact is None:
        return [item.variant, item.state, "", seconds, "", "", "", "", ""]
    size = size_text(item.artifact.manifest.size_bytes)
    return [item.variant, item.state, size, seconds, *quality(item.artifact).cells(), item.artifact.ref]


def _as_json(item: Outcome) -> dict[str, Any]:
    manifest = item.artifact.manifest if item.artifact else None
    return {
        "variant": item.variant,
        "state": item.state,
        "seconds": round(item.seconds, 2),
        "folder": str(item.artifact.folder) if item.artifact else None,
        "digest": manifest.digest if manifest else None,
        "size_bytes": manifest.size_bytes if manifest else None,
        "evaluation": quality(item.artifact).as_json() if item.artifact else None,
        "error": str(item.error) if item.error else None,
    }
