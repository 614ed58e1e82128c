"""What commands share: options, the store and cache they mean, tables and JSON on stdout."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quantize.cli import set_verbose
from quantize.cli.table import Column
from quantize.store.store import Store, default_store_root
from quantize.system.cache import Cache, default_cache_root

if TYPE_CHECKING:
    from quantize.evaluate.metric import Metric
    from quantize.evaluate.metrics import Summary
    from quantize.formats.base import RunLimits
    from quantize.recipe.model import Recipe
    from quantize.store.artifact import Artifact

Function = TypeVar("Function", bound=Callable[..., Any])
Found = TypeVar("Found")


def is_verbose() -> bool:
    """Whether -v stands on the line."""
    return bool(click.get_current_context().meta.get("quantize.verbose"))


def verbose_option(function: Function) -> Function:
    """-v after the command as well as before it."""
    return click.option(
        "-v", "--verbose", is_flag=True, expose_value=False, callback=set_verbose, help="Show tracebacks."
    )(function)


def store_option(function: Function) -> Function:
    """--store DIR, passed as a Store."""
    return click.option(
        "--store",
        type=click.Path(path_type=Path, file_okay=False),
        default=None,
        callback=lambda _c, _p, value: Store(value or default_store_root()),
        help="Folder of the artifacts.  [default: $QUANTIZE_STORE or artifacts/]",
    )(function)


def json_option(function: Function) -> Function:
    """--json, passed as as_json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")(function)


def quiet_option(function: Function) -> Function:
    """--quiet: nothing on stderr but errors and warnings."""
    return click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")(function)


def threads_option(function: Function) -> Function:
    """--threads N, passed as threads."""
    return click.option(
        "--threads", type=click.IntRange(min=1), default=None, help="CPU threads.  [default: all cores]"
    )(function)


def limits_options(function: Function) -> Function:
    """--threads, --device, --memory-budget: how to run, never what to build."""
    options = [
        threads_option,
        click.option(
            "--device", default="cpu", show_default=True, help="cpu, or cuda[:N]: of the pass and evaluation."
        ),
        click.option("--memory-budget", default=None, metavar="SIZE", help="Memory to stay under, such as 6GiB."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def trust_options(function: Function) -> Function:
    """--public-key, --identity, --issuer: whose signature counts; see provenance.signature.Trust."""
    options = [
        click.option(
            "--public-key", type=click.Path(path_type=Path, dir_okay=False), help="PEM file of the key that must sign."
        ),
        click.option("--identity", help="Who must have signed by Sigstore: an e-mail address, or a workflow's URI."),
        click.option("--issuer", help="Who vouches for --identity, such as https://accounts.google.com."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def make_limits(threads: int | None, device: str, memory_budget: str | None, *, here: bool = True) -> RunLimits:
    """Limits from the options. Raises as RunLimits.of does."""
    from quantize.formats.base import RunLimits

    return RunLimits.of(threads, device, memory_budget, here=here)


def quality(artifact: Artifact) -> Summary:
    """What tables say of an artifact's evaluation."""
    from quantize.evaluate.decision import Verdict
    from quantize.evaluate.metrics import Summary

    found = Summary.of(artifact.measurements())
    if artifact.manifest.accepted_risk is None:
        return found
    return dataclasses.replace(found, verdict=Verdict.RISK_ACCEPTED)


def quality_columns(shown: Sequence[Metric]) -> list[Column]:
    """Columns of a table for the figures that are shown there, and for the verdict of the gates."""
    from quantize.evaluate.metric import Detail

    found = [
        Column(item.short.upper(), "right", rank=2 if item.detail is Detail.LIST and not item.kind else 4)
        for item in shown
    ]
    return [*found, Column("GATES")]


def open_recipe(given: Path) -> Recipe:
    """The recipe that a path or a name means; what there is to say of where it was found is said. Raises UsageError."""
    from quantize.formats import option_models
    from quantize.recipe.model import load_recipe
    from quantize.targets import RecipeTarget, find_target

    store = click.get_current_context().params.get("store") or Store()
    found = noted(find_target(str(given), store, (RecipeTarget,)))
    recipe = load_recipe(found.path, option_models())
    say(*recipe.notes)
    return recipe


def noted(target: Found) -> Found:
    """The target that was found; where its name could have meant two, which it is is said."""
    say(getattr(target, "note", None))
    return target


def say(*notes: str | None) -> None:
    """Notes on stderr, unless --quiet; None is nothing to say."""
    if not click.get_current_context().params.get("quiet"):
        for note in filter(None, notes):
            click.echo(f"note: {note}", err=True)


def open_cache() -> Cache:
    """The cache of this user."""
    return Cache(default_cache_root())


def print_json(data: Any) -> None:
    """Print data as JSON on stdout."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))
