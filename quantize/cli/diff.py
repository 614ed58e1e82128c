"""quantize diff A B"""

from __future__ import annotations

import click

from quantize.cli.common import json_option, print_json, store_option, verbose_option
from quantize.cli.table import Column, print_table, wide_option
from quantize.evaluate.metric import Reading
from quantize.evaluate.metrics import readings
from quantize.evaluate.record import EvaluationRecord, read_record
from quantize.formats.diff import Difference, compare
from quantize.store.artifact import Artifact
from quantize.store.store import Store
from quantize.targets import find_artifact


@click.command("diff")
@click.argument("first")
@click.argument("second")
@store_option
@wide_option
@json_option
@verbose_option
def command(first: str, second: str, store: Store, as_json: bool) -> None:
    """Compare two artifacts: settings, tools, source, files, tensor types and sizes; and quality, where both were
    measured.
    """
    one, other = find_artifact(first, store), find_artifact(second, store)
    differences, figures = compare(one, other), _figures(one, other)
    if as_json:
        found = [Difference(f"evaluation.{ours.metric.key}", ours.data, theirs.data) for ours, theirs in figures]
        print_json([item.__dict__ for item in (*differences, *found)])
        return
    rows = [_row(item) for item in differences]
    rows += [[ours.metric.title_with_unit, ours.text, theirs.text] for ours, theirs in figures]
    columns = [Column("WHAT"), Column("FIRST"), Column("SECOND")]
    print_table(columns, rows, empty="no difference")
    if figures and _text_of(one) != _text_of(other):
        click.echo("the two were measured on different text: their figures can't be compared")


def _figures(one: Artifact, other: Artifact) -> list[tuple[Reading, Reading]]:
    """The metrics of both that are not the same."""
    ours, theirs = ({item.metric.key: item for item in _readings(artifact)} for artifact in (one, other))
    return [(item, theirs[key]) for key, item in ours.items() if key in theirs and item.data != theirs[key].data]


def _readings(artifact: Artifact) -> list[Reading]:
    record = _record(artifact)
    return [] if record is None else readings(record)


def _text_of(artifact: Artifact) -> str | None:
    record = _record(artifact)
    return None if record is None or record.quality is None else record.quality.windows_hash


def _record(artifact: Artifact) -> EvaluationRecord | None:
    return read_record(artifact.measurements())


def _row(item: Difference) -> list[str]:
    return [item.what, _text(item.first), _text(item.second)]


def _text(value: object) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
