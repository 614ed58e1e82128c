"""quantize build RECIPE"""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantize.build.execute import execute
from quantize.build.execution import RunOptions
from quantize.build.outcome import Outcome, OutcomeState
from quantize.build.plan import Plan, make_plan
from quantize.build.spread.cluster import check_address, forms
from quantize.cli.common import (
    json_option,
    limits_options,
    make_limits,
    open_cache,
    open_recipe,
    print_json,
    quality,
    quality_columns,
    quiet_option,
    store_option,
    verbose_option,
)
from quantize.cli.progress import console_reporter
from quantize.cli.table import Column, print_table, wide_option
from quantize.errors import QuantizeError, UsageError, WorkerDied
from quantize.evaluate.metric import Detail
from quantize.evaluate.metrics import cells, metrics
from quantize.evaluate.record import source_lines
from quantize.recipe.model import Recipe
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.sizes import size_text

if TYPE_CHECKING:
    from quantize.cluster.units import ClusterOptions


@click.command("build")
@click.argument("recipes", metavar="RECIPE...", nargs=-1, required=True, type=click.Path(path_type=Path))
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
@click.option(
    "--cluster",
    metavar="ADDRESS",
    help=f"Build on a cluster: {forms()}.",
)
@click.option("--watch", is_flag=True, help="With --cluster: show nodes, workers, blocks, queue and the time left.")
@click.option(
    "--trace", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="With --cluster: write a timeline of all work, for chrome://tracing.",
)  # fmt: skip
@store_option
@limits_options
@wide_option
@json_option
@quiet_option
@verbose_option
def command(
    recipes: tuple[Path, ...], only: tuple[str, ...], force: bool, keep_intermediates: bool, no_eval: bool,
    accept_risk: str | None, locked: bool, keep_going: bool, cluster: str | None, watch: bool, trace: Path | None,
    store: Store, threads: int | None, device: str, memory_budget: str | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Build every variant of each RECIPE that is not up to date; each is verified, measured against its source, and
    held to the recipe's gates before it counts as built. What the gates refuse is kept aside (exit code 3).
    """
    if accept_risk is not None and not accept_risk.strip():
        raise UsageError("--accept-risk needs a reason", hint='say who knows why: --accept-risk "for load tests only"')
    options = _cluster_options(cluster, device, threads, watch, trace)
    parsed = [open_recipe(recipe) for recipe in recipes]
    limits = make_limits(threads, device, memory_budget, here=options is None)
    run = RunOptions(limits, keep_going, keep_intermediates, accept_risk)
    with console_reporter(quiet=quiet or as_json) as reporter:
        workspace = Workspace(store, open_cache(), reporter)

        def planned(recipe: Recipe) -> Plan:
            if not locked:
                return make_plan(recipe, workspace, only=only, force=force, evaluate=not no_eval)
            from quantize.build.lockfile import hold, lock_path, read_lock

            lock, kind = read_lock(lock_path(recipe.path)), device if options is None else None
            return hold(lock, recipe, workspace, only=only, force=force, evaluate=not no_eval, device=kind)

        plans: Iterable[Plan] = map(planned, parsed)
        if locked:
            plans = [*plans]  # all are held to their locks before anything is built
        if options is not None:
            from quantize.cluster.units import execute_on_cluster

            found = execute_on_cluster([*plans], workspace, run, options)
        else:
            found = [(plan.recipe, outcome) for plan in plans for outcome in execute(plan, workspace, run)]
    _show(found, as_json=as_json, several=len(recipes) > 1)
    failed = [outcome.error for _, outcome in found if outcome.error is not None]
    if failed:
        if click.get_current_context().meta.get("quantize.verbose"):
            click.echo("\n".join("".join(traceback.format_exception(error)) for error in failed), err=True)
        click.echo(summary(found, several=len(recipes) > 1), err=True)
        click.get_current_context().exit(max(error.exit_code for error in failed))


def _cluster_options(
    address: str | None, device: str, threads: int | None, watch: bool, trace: Path | None
) -> ClusterOptions | None:
    """Raises UsageError, MissingExtraError."""
    if address is None:
        if watch or trace is not None:
            raise UsageError(
                f"{'--watch' if watch else '--trace'} is for builds on a cluster", hint="add --cluster local"
            )
        return None
    from quantize.cluster.units import ClusterOptions

    check_address(address)
    if device not in {"cpu", "cuda"}:
        raise UsageError(f"--device {device!r} is none of a cluster's", hint="use --device cpu or --device cuda")
    return ClusterOptions(address, threads, trace, watch)


def _show(found: list[tuple[Recipe, Outcome]], *, as_json: bool, several: bool) -> None:
    if as_json:
        print_json([{"recipe": recipe.name, **_as_json(item)} for recipe, item in found])
        return
    columns = [
        Column("VARIANT"),
        Column("STATE"),
        Column("SIZE", "right"),
        Column("SECONDS", "right", rank=4),
        *quality_columns(metrics(Detail.LIST)),
        Column("ARTIFACT", rank=3),
    ]
    rows = [_row(item) for _, item in found]
    if several:
        columns = [Column("RECIPE"), *columns]
        rows = [[recipe.name, *row] for (recipe, _), row in zip(found, rows, strict=True)]
    print_table(columns, rows, empty="nothing to build")
    measured = [(recipe.name, quality(item.artifact).golden) for recipe, item in found if item.artifact is not None]
    for note in source_lines(measured):
        click.echo(note)


def summary(found: list[tuple[Recipe, Outcome]], *, several: bool) -> str:
    """What did not become an artifact: each distinct reason once, with all that it hit and what to do; then the rest.

    several: names carry their recipe's.
    """
    reasons: dict[tuple[OutcomeState, str, str | None], list[tuple[str, QuantizeError]]] = {}
    others: dict[OutcomeState, list[str]] = {}
    for recipe, item in found:
        name = f"{recipe.name}/{item.variant}" if several else item.variant
        if item.error is None:
            others.setdefault(item.state, []).append(name)
        else:
            why = item.error.reason if isinstance(item.error, WorkerDied) else item.error.message
            reasons.setdefault((item.state, why, item.error.hint), []).append((name, item.error))
    lines = []
    for (state, why, hint), hit in reasons.items():
        steps = {error.message.partition(why)[0] for _, error in hit}  # what one reason ended: "loading in llama.cpp: "
        what = f"{len(hit)} of {len(found)} variants {state}" if len(found) > 1 else f"the variant {state}"
        step = steps.pop() if len(steps) == 1 else ""
        lines.append(f"{what}: {step}{why} ({', '.join(name for name, _ in hit)})")
        lines += [f"  {hint}"] if hint else []
    return "\n".join([*lines, *(f"{state}: {', '.join(names)}" for state, names in others.items())])


def _row(item: Outcome) -> list[str]:
    seconds = f"{item.seconds:.1f}" if item.seconds else ""
    if item.artifact is None:
        return [item.variant, item.state, "", seconds, *cells(None, metrics(Detail.LIST)), "", ""]
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
