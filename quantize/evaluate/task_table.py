"""Task scores as people read them: cells, and a note on how they were measured.

In: TasksRecords. Out: rows of text for `eval`, `show`, evaluation.md, model card and report.
"""

from __future__ import annotations

from collections.abc import Sequence

from quantize.evaluate.task_files import HARNESS
from quantize.evaluate.task_record import TaskMetric, TaskResult, TasksRecord

HEADINGS = ("task", "metric", "artifact", "source", "difference")


def task_rows(record: TasksRecord | None) -> list[list[str]]:
    """A row for each metric of each task, under HEADINGS; none where no tasks were asked for."""
    if record is None:
        return []
    return [
        [task.title, item.title, *metric_texts(item), difference_text(item)]
        for task in record.results
        for item in task.metrics
    ]  # fmt: skip


def metric_texts(metric: TaskMetric) -> tuple[str, str]:
    """What the artifact reaches, and what its source does, with the harness's standard errors."""
    return (
        _value(metric, metric.value, metric.stderr),
        _value(metric, metric.source_value, metric.source_stderr),
    )


def task_verdict(task: TaskResult, metric: TaskMetric, names: tuple[str, str]) -> str:
    """A sentence on two artifacts, of a metric of `compare_tasks`. names: of the first and the second."""
    what, found = f"{task.title}, {metric.title}", metric.loss_interval
    text = f"{names[1]} less {names[0]}: {difference_text(metric)}"
    if found is None:
        return f"{what}: {text}"
    if found.low <= 0 <= found.high:
        return f"{what}: no difference shown; {text} (95 %)"
    return f"{what}: {names[0 if found.low > 0 else 1]} is better; {text} (95 %)"


def difference_text(metric: TaskMetric) -> str:
    """Artifact less source with the half width of its interval: "-1.2 ± 0.8 points"."""
    half = None if metric.interval is None else metric.interval.half_width
    if metric.is_share:
        return f"{100 * metric.difference:+.1f}{'' if half is None else f' ± {100 * half:.1f}'} points"
    return f"{metric.difference:+.4g}{'' if half is None else f' ± {half:.2g}'}"


def task_lines(record: TasksRecord | None) -> list[str]:
    """What must be known beside the rows: a line for each task, however often asked, and how figures came about."""
    if record is None:
        return []
    lines = list(dict.fromkeys(_line(task, record) for task in record.results))
    lines += [f"{name} was not measured: {why}" for name, why in sorted(record.skipped.items())]
    if record.results:
        lines.append(
            f"by {HARNESS} {record.version}, seed {record.seed}, at most {record.context:,} tokens at a time; in "
            "parentheses its own standard error, ± half the width of the interval that the difference lies in with "
            "95 % confidence, sample by sample"
        )
    return lines


def same_lines(records: Sequence[TasksRecord | None]) -> list[str]:
    """The lines of several artifacts, each line once."""
    return list(dict.fromkeys(line for record in records for line in task_lines(record)))


def _line(task: TaskResult, record: TasksRecord) -> str:
    cut = f"; {task.cut} requests were cut to {record.context:,} tokens" if task.cut else ""
    known = [f"version {task.version}"] if task.version else []
    known += [task.file] if task.file else []
    about = f" ({', '.join(known)})" if known else ""
    where = f"in {task.runtime}, the source in {task.source_runtime}"
    return f"{task.name}{about}: {task.samples:,} samples of {task.data}, {where}{cut}"


def _value(metric: TaskMetric, value: float, error: float | None) -> str:
    if metric.is_share:
        return f"{value:.1%}" + (f" ({100 * error:.1f})" if error is not None else "")
    return f"{value:.4g}" + (f" ({error:.2g})" if error is not None else "")
