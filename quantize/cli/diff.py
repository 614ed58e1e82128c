"""quantize diff A B"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from quantize.cli.common import json_option, print_json, store_option, verbose_option
from quantize.cli.table import Column, print_table, wide_option
from quantize.evaluate.difference import QualityDifference, compare_quality
from quantize.evaluate.metric import Reading
from quantize.evaluate.metrics import readings
from quantize.evaluate.record import EvaluationRecord, read_record
from quantize.evaluate.task_record import TaskMetric, TaskResult, compare_tasks
from quantize.evaluate.task_table import metric_texts, task_verdict
from quantize.formats.diff import Difference, compare
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
    records = [read_record(item.measurements()) for item in (one, other)]
    differences, figures = compare(one, other), _figures(records)
    tasks = compare_tasks(*(None if record is None else record.tasks for record in records))
    if as_json:
        found = [Difference(f"evaluation.{ours.metric.key}", ours.data, theirs.data) for ours, theirs in figures]
        print_json([*(item.__dict__ for item in (*differences, *found)), *_better(records), *_tasks(tasks)])
        return
    rows = [_row(item) for item in differences]
    rows += [[ours.metric.title_with_unit, ours.text, theirs.text] for ours, theirs in figures]
    rows += [[f"{task.title}, {item.title}", *metric_texts(item)[::-1]] for task, item in tasks if item.difference]
    columns = [Column("WHAT"), Column("FIRST"), Column("SECOND")]
    print_table(columns, rows, empty="no difference")
    if figures and len({_text_of(record) for record in records}) > 1:
        click.echo("the two were measured on different text: their figures can't be compared")
    difference, names = _difference(records), (one.manifest.variant, other.manifest.variant)
    if difference is not None:
        click.echo(difference.text(names))
    for task, item in tasks:
        click.echo(task_verdict(task, item, names))


def _difference(records: Sequence[EvaluationRecord | None]) -> QualityDifference | None:
    first, second = (None if record is None else record.quality for record in records)
    return None if first is None or second is None else compare_quality(first, second)


def _better(records: Sequence[EvaluationRecord | None]) -> list[dict[str, Any]]:
    """Which is better, as JSON has it; nothing where it is not known."""
    found = _difference(records)
    if found is None:
        return []
    interval = [found.low, found.high]
    return [{"what": "evaluation.better", "first": found.better == 1, "second": found.better == 2, "kl": interval}]


def _tasks(found: Sequence[tuple[TaskResult, TaskMetric]]) -> list[dict[str, Any]]:
    """Of each metric both values, as JSON has them, and the second less the first with its interval."""
    return [
        {
            "what": f"evaluation.tasks.{task.name}.{item.title}", "first": item.source_value, "second": item.value,
            "difference": item.difference,
            "interval": None if item.interval is None else [item.interval.low, item.interval.high],
        }
        for task, item in found
    ]  # fmt: skip


def _figures(records: Sequence[EvaluationRecord | None]) -> list[tuple[Reading, Reading]]:
    """The metrics of both that are not the same."""
    ours, theirs = ({item.metric.key: item for item in readings(record)} if record else {} for record in records)
    return [(item, theirs[key]) for key, item in ours.items() if key in theirs and item.data != theirs[key].data]


def _text_of(record: EvaluationRecord | None) -> str | None:
    return None if record is None or record.quality is None else record.quality.windows_hash


def _row(item: Difference) -> list[str]:
    return [item.what, _text(item.first), _text(item.second)]


def _text(value: object) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
