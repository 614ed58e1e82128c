"""quantize eval ARTIFACT…"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from quantize.build.evaluate_again import reevaluate, to_evaluate
from quantize.build.settle import Settled
from quantize.cli.common import (
    json_option,
    make_limits,
    noted,
    open_cache,
    print_json,
    quality_columns,
    quiet_option,
    store_option,
    threads_option,
    verbose_option,
)
from quantize.cli.progress import console_reporter
from quantize.cli.table import Column, print_table, wide_option
from quantize.errors import UsageError
from quantize.evaluate.kinds import known, text_parts
from quantize.evaluate.metric import Detail, Metric
from quantize.evaluate.metrics import cells, golden_count, metrics
from quantize.evaluate.record import source_lines
from quantize.evaluate.task_table import HEADINGS, same_lines, task_rows
from quantize.recipe.evaluation import Effort
from quantize.runtimes.devices import check_name
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.lookup import GOLDEN, builtin_files, find_data
from quantize.targets import ArtifactTarget, RecipeTarget, find_target


@click.command("eval")
@click.argument("targets", nargs=-1, required=True, metavar="ARTIFACT|RECIPE...")
@click.option("--text", help="Other held-out text: mixed or one of its kinds, python-docs, or a file of text.")
@click.option("--column", help="Column of a .jsonl, .json or .parquet file with the text.")
@click.option("--window", type=click.IntRange(min=16), help="Tokens that are read at a time.")
@click.option("--windows", type=click.IntRange(min=0), help="At most so many windows of each kind; 0 takes all.")
@click.option("--effort", type=click.Choice(["full", "quick"]), help="quick: about a ninth of the text.")
@click.option("--golden", multiple=True, type=click.Path(path_type=Path), help="Other golden prompts.")
@click.option("--no-golden", is_flag=True, help="Ask no golden prompts.")
@click.option("--no-tasks", is_flag=True, help="Leave out the recipe's tasks of lm-evaluation-harness.")
@threads_option
@click.option("--device", default="auto", show_default=True, help="auto, cpu, or a GPU such as cuda:0 or vulkan:0.")
@store_option
@wide_option
@json_option
@quiet_option
@verbose_option
def command(
    targets: tuple[str, ...], text: str | None, column: str | None, window: int | None, windows: int | None,
    effort: str | None, golden: tuple[Path, ...], no_golden: bool, no_tasks: bool, threads: int | None, device: str,
    store: Store, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Measure artifacts in their real runtimes against their full-precision source, and hold the recipe's gates.

    A recipe stands for its current artifacts. What is measured goes into measurements.json, and an artifact that the
    gates refuse is moved aside (exit code 3). With other text or prompts than the recipe's nothing is written or moved.
    """
    chosen = None if effort is None else Effort(effort)
    given = {"text": text, "column": column, "window": window, "windows": windows, "effort": chosen}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if text is not None and Path(text).is_file():
        changes["text"] = str(Path(text).absolute())
    if golden or no_golden:
        named = [] if no_golden else golden
        changes["golden"] = [str(path.absolute() if path.exists() else path) for path in named]
    if no_tasks:
        changes["tasks"] = []
    meant = [noted(find_target(word, store, (ArtifactTarget, RecipeTarget))) for word in targets]
    found = [item for target in meant for item in to_evaluate(target, store)]
    _check_files(text, () if no_golden else golden, {Path(), *(item.recipe.path.parent for item in found)})
    limits, results = replace(make_limits(threads, "cpu", None), device=check_name(device)), []
    with console_reporter(quiet=quiet or as_json) as reporter:
        workspace = Workspace(store, open_cache(), reporter)
        for target in found:
            results.append(reevaluate(target, workspace, limits, changes))
    if as_json:
        print_json([_as_json(item, recorded=not changes) for item in results])
    else:
        shown = metrics(Detail.TABLE, [item.record for item in results])
        columns = [Column("ARTIFACT"), *quality_columns(shown)]
        print_table(columns, [_row(item, shown) for item in results], empty="nothing to measure")
        for note in source_lines((item.artifact.manifest.name, golden_count(item.record)) for item in results):
            click.echo(note)
        _print_tasks(results)
    refused = [item.error for item in results if item.error is not None]
    for error in refused:
        click.echo(f"refused: {error}", err=True)
    if refused:
        click.get_current_context().exit(max(error.exit_code for error in refused))


def _check_files(text: str | None, golden: tuple[Path, ...], folders: set[Path]) -> None:
    """Raises UsageError: an option names what is not there, neither here nor beside a recipe."""
    if text is not None and not any(_is_text(text, folder) for folder in folders):
        hint = f"give a .txt, .jsonl, .json or .parquet file, or one of {', '.join(known())}"
        raise UsageError(f"--text {text}: no such file", hint=hint)
    for path in golden:
        if not any(find_data(str(path), folder, GOLDEN) for folder in folders):
            named = ", ".join(builtin_files(GOLDEN))
            raise UsageError(f"--golden {path}: no such file", hint=f"give a .yaml file, or a name: {named}")


def _is_text(text: str, folder: Path) -> bool:
    try:
        return bool(text_parts(text, folder))
    except UsageError:
        return False


def _print_tasks(results: Sequence[Settled]) -> None:
    records = [item.record.tasks if item.record is not None else None for item in results]
    rows = [
        [item.artifact.ref, *row] for item, record in zip(results, records, strict=True) for row in task_rows(record)
    ]
    if rows:
        click.echo()
        columns = [Column(text.upper(), "right" if place > 1 else "left") for place, text in enumerate(HEADINGS)]
        print_table([Column("ARTIFACT"), *columns], rows, empty="no tasks")
    for line in same_lines(records):
        click.echo(line)


def _row(item: Settled, shown: Sequence[Metric]) -> list[str]:
    assert item.record is not None
    return [item.artifact.ref, *cells(item.record, shown), item.record.verdict.value]


def _as_json(item: Settled, *, recorded: bool) -> dict[str, Any]:
    assert item.record is not None
    return {
        "artifact": item.artifact.ref,
        "digest": item.artifact.manifest.digest,
        "folder": str(item.artifact.folder),
        "recorded": recorded,
        "evaluation": item.record.to_data(),
    }
