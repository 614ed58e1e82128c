"""What a record keeps of tasks of lm-evaluation-harness: the scores of one model, and artifact against source.

In: figures as the harness gives them. Out: TaskScores, kept of a source in the cache; TaskResult, in measurements.json.
A difference is the artifact's figure less the source's, sample by sample on the same samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from quantize.errors import VerifyError
from quantize.evaluate.decision import RecordModel
from quantize.evaluate.intervals import paired_difference
from quantize.evaluate.numbers import Count, Interval, Number


class MetricScores(RecordModel):
    """One metric of one model on one task. filter: of the answers, as the harness calls it; "none" for none.

    stderr: the harness's own; None where it has none. is_share: whether the figure is the mean of scores of 0 to 1.
    scores: of each sample; empty where the figure is no mean of them.
    """

    name: str
    filter: str
    value: Number
    stderr: Number | None
    higher_is_better: bool
    is_share: bool
    scores: Annotated[tuple[Number, ...], Field(strict=False)] = ()


class TaskScores(RecordModel):
    """What one model reaches on a task. version: of the task; "" where it says none. cut: requests that were longer
    than the context and lost their beginning.
    """

    runtime: str
    runtime_version: str
    version: str
    samples: Count
    shots: Count
    cut: Count
    metrics: Annotated[tuple[MetricScores, ...], Field(strict=False)]


class TaskData(RecordModel):
    """The data set of a task. revision: of one on the hub; files: local ones, name -> sha256."""

    path: str
    name: str = ""
    revision: str | None = None
    files: Mapping[str, str] = {}

    def __str__(self) -> str:
        where = f"{self.path} {self.name}".strip()
        if self.revision is not None:
            return f"{where}@{self.revision[:12]}"
        return ", ".join(f"{name} (sha256 {digest[:12]})" for name, digest in self.files.items()) or where


class TaskMetric(RecordModel):
    """One metric of a task: artifact and source.

    difference: the artifact's less the source's. interval: of the difference, with 95 % confidence; None where the
    figure is no mean of scores, or there are too few. scores: the artifact's, of each sample, for comparing artifacts;
    empty in older records.
    """

    name: str
    filter: str
    value: Number
    stderr: Number | None
    source_value: Number
    source_stderr: Number | None
    difference: Number
    interval: Interval | None
    higher_is_better: bool
    is_share: bool
    scores: Annotated[tuple[Number, ...], Field(strict=False)] = ()

    @property
    def title(self) -> str:
        """As tables show it."""
        return self.name if self.filter == "none" else f"{self.name} ({self.filter})"

    @property
    def loss(self) -> float:
        """How much worse the artifact is, in the metric's own unit; below 0 where it is better."""
        return -self.difference if self.higher_is_better else self.difference

    @property
    def loss_interval(self) -> Interval | None:
        """Where the loss lies."""
        found = self.interval
        if found is None or not self.higher_is_better:
            return found
        return Interval(low=-found.high, high=-found.low)


class TaskResult(RecordModel):
    """One task, both models. file: the task file's name; "" for a task of the harness's own. main: place among the
    metrics of the one that the gate looks at. runtime, source_runtime: what each ran in, with versions. identity: names
    the task, its data and how it is asked; "" in older records.
    """

    name: str
    file: str
    version: str
    data: TaskData
    samples: Count
    shots: Count
    chat: bool
    cut: Count
    main: Count
    runtime: str
    source_runtime: str
    metrics: Annotated[tuple[TaskMetric, ...], Field(strict=False, min_length=1)]
    identity: str = ""

    @property
    def title(self) -> str:
        """As tables show it."""
        return f"{self.name}, {self.shots}-shot{', chat' if self.chat else ''}"

    @property
    def main_metric(self) -> TaskMetric:
        """The one that the gate looks at."""
        return self.metrics[min(self.main, len(self.metrics) - 1)]


class TasksRecord(RecordModel):
    """All tasks of an evaluation. version: of lm-evaluation-harness. seed: of the choice of examples.

    resamples: of the harness's bootstrap, where a standard error has no formula. context: tokens of a request and its
    answer. skipped: name -> why it was not measured.
    """

    version: str
    seed: int
    resamples: int
    context: Count
    results: Annotated[tuple[TaskResult, ...], Field(strict=False)]
    skipped: Mapping[str, str] = {}


def compare_tasks(first: TasksRecord | None, second: TasksRecord | None) -> list[tuple[TaskResult, TaskMetric]]:
    """Metrics of the tasks that both artifacts were asked alike: of each, the second artifact beside the first, which
    stands in the source's place.
    """
    if first is None or second is None or (first.version, first.context) != (second.version, second.context):
        return []
    known = {
        (task.identity, item.name, item.filter): _scores(item)
        for task in first.results if task.identity for item in task.metrics
    }  # fmt: skip
    return [
        (task, compared(_scores(item), known[key]))
        for task in second.results
        for item in task.metrics
        if (key := (task.identity, item.name, item.filter)) in known and len(known[key].scores) == len(item.scores)
    ]


def _scores(metric: TaskMetric) -> MetricScores:
    """What one artifact reached."""
    return MetricScores(
        name=metric.name, filter=metric.filter, value=metric.value, stderr=metric.stderr,
        higher_is_better=metric.higher_is_better, is_share=metric.is_share, scores=metric.scores,
    )  # fmt: skip


def compared(ours: MetricScores, theirs: MetricScores) -> TaskMetric:
    """A metric of the artifact beside its source's. Raises VerifyError: they are of different samples."""
    if len(ours.scores) != len(theirs.scores):
        raise VerifyError(f"{ours.name}: {len(ours.scores)} samples, of the source {len(theirs.scores)}")
    found = paired_difference(ours.scores, theirs.scores)
    return TaskMetric(
        name=ours.name, filter=ours.filter, value=ours.value, stderr=ours.stderr, source_value=theirs.value,
        source_stderr=theirs.stderr, difference=ours.value - theirs.value,
        interval=None if found is None else Interval(low=found[0], high=found[1]),
        higher_is_better=ours.higher_is_better, is_share=ours.is_share and theirs.is_share, scores=ours.scores,
    )  # fmt: skip
