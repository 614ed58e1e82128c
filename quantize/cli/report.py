"""quantize report [NAME]"""

from __future__ import annotations

from pathlib import Path

import click

from quantize.cli.common import json_option, print_json, say, store_option, verbose_option
from quantize.cli.table import Column, print_table, wide_option
from quantize.evaluate.decision import Decision
from quantize.report.decision_text import headline
from quantize.report.render import choice_data, write_report
from quantize.store.store import Store


@click.command("report")
@click.argument("name", required=False)
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default=None,
    help="Folder for the pages.  [default: reports/NAME/]",
)  # fmt: skip
@store_option
@wide_option
@json_option
@verbose_option
def command(name: str | None, output: Path | None, store: Store, as_json: bool) -> None:
    """Write a page about the artifacts of the recipe NAME, or about one artifact.

    report.html (one file, no network), report.md and production_decision.md: quality, memory, latency, layers, golden
    answers, provenance, and what to serve by the recipe's limits; size against loss as quality.svg and quality.png.
    NAME can be left out where there is one recipe.
    """
    written = write_report(store, name, output)
    choice, paths = written.choice, written.files
    say(written.note)
    if as_json:
        print_json({**choice_data(choice), "files": [str(path) for path in paths]})
        return
    rows = [[item.entry.variant, item.word.value, _why(item.decision)] for item in choice.verdicts]
    print_table([Column("VARIANT"), Column("VERDICT"), Column("WHY")], rows, empty="nothing to report")
    click.echo(f"serve: {choice.serve.entry.artifact.ref}" if choice.serve else "serve: none of these")
    click.echo(f"why: {headline(choice)[2]}")
    on_front = [item.variant for item in choice.comparison.artifacts if item.is_on_front]
    click.echo(f"front: {', '.join(on_front) or 'none'}")
    for path in paths:
        click.echo(str(path))


def _why(decision: Decision) -> str:
    findings = decision.refusals or decision.missing or decision.flags
    return ", ".join(dict.fromkeys(item.gate for item in findings))
