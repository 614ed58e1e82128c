"""Tasks of lm-evaluation-harness in an evaluation: the source's scores once, from the cache; then the artifact's.

In: an EvaluationJob with tasks, a Runtime. Out: TaskScores by task, TasksRecord. The harness itself is harness.py's,
which is imported where there are tasks, and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from quantize.errors import MissingExtraError
from quantize.evaluate.task_files import EXTRA, HARNESS, PinnedTask, harness_version
from quantize.evaluate.task_record import TaskResult, TaskScores, TasksRecord, compared
from quantize.events import Reporter, note, status, warn
from quantize.runtimes.base import Runtime
from quantize.runtimes.devices import DevicePlace
from quantize.system.cache import Cache

if TYPE_CHECKING:
    from quantize.evaluate.harness import LoadedTask

KIND, FILE = "task-scores", "scores.json"
STREAMED = "it asks for answers in the model's own words, and a model that is read block by block gives none"


def load(pinned: tuple[PinnedTask, ...]) -> tuple[LoadedTask, ...]:
    """The harness's tasks with their data. Raises MissingExtraError; RecipeError: one can't be made."""
    if not pinned:
        return ()
    try:
        from quantize.evaluate.harness import load_tasks
    except ImportError as exc:
        raise MissingExtraError(f"`evaluation: tasks` ({HARNESS})", EXTRA) from exc
    return load_tasks(pinned)


class TaskRun:
    """The tasks of one evaluation on one model. tokenizer: folder of the source's. context: tokens of a request."""

    def __init__(
        self, reporter: Reporter, tasks: Sequence[LoadedTask], tokenizer: Path, context: int, place: DevicePlace
    ) -> None:
        self._reporter, self._tokenizer, self._context = reporter, tokenizer, context
        self.skipped = {item.pinned.name: STREAMED for item in tasks if place.streamed and item.generates}
        self._tasks = [item for item in tasks if item.pinned.name not in self.skipped]

    def find(self, cache: Cache, digest: str, tools: Mapping[str, str]) -> dict[str, TaskScores] | None:
        """The source's scores by task, if all of them are in the cache."""
        found = {task.pinned.identity: _read(cache, self._key(task, digest, tools)) for task in self._tasks}
        known = {identity: scores for identity, scores in found.items() if scores is not None}
        return known if len(known) == len(found) else None

    def measure_source(
        self, runtime: Runtime, cache: Cache, digest: str, tools: Mapping[str, str]
    ) -> dict[str, TaskScores]:
        """The source's scores by task; each goes into the cache when it is there."""
        found: dict[str, TaskScores] = {}
        for task in self._tasks:
            key = self._key(task, digest, tools)
            scores = _read(cache, key) or self._measured(task, runtime, "the source")
            text = scores.model_dump_json()
            cache.make(KIND, key, lambda folder, text=text: _write(folder, text))  # type: ignore[misc]
            found[task.pinned.identity] = scores
        return found

    def measure(self, runtime: Runtime, source: Mapping[str, TaskScores]) -> TasksRecord:
        """The artifact's scores beside the source's. Raises UsageError, RecipeError, VerifyError."""
        from quantize.evaluate.harness import RESAMPLES, SEED

        skipped, results = dict(self.skipped), []
        for task in self._tasks:
            theirs = source.get(task.pinned.identity)
            if theirs is None:
                skipped[task.pinned.name] = f"of the source: {STREAMED}"
                continue
            results.append(_result(task, self._measured(task, runtime, "the artifact"), theirs))
        for name, why in skipped.items():
            note(self._reporter, "", f"the task {name} is not measured: {why}")
        return TasksRecord(
            version=harness_version(), seed=SEED, resamples=RESAMPLES, context=self._context, results=tuple(results),
            skipped=skipped,
        )  # fmt: skip

    def _measured(self, task: LoadedTask, runtime: Runtime, side: str) -> TaskScores:
        from quantize.evaluate.harness import run_task
        from quantize.evaluate.task_model import RuntimeModel

        name = task.pinned.name
        status(self._reporter, "", f"asking {side} the task {name}")
        model = RuntimeModel(runtime, self._tokenizer, self._context, self._reporter, f"task {name}")
        found = run_task(task, model, (runtime.name, runtime.version))
        if found.cut:
            hint = "`evaluation: context` sets how many are read"
            warn(self._reporter, "", f"task {name}: {found.cut} requests have over {self._context:,} tokens; their "
                 f"beginning was left out; {hint}")  # fmt: skip
        return found

    def _key(self, task: LoadedTask, digest: str, tools: Mapping[str, str]) -> str:
        pinned = [digest, task.pinned.identity, harness_version(), self._context, dict(tools)]
        return hashlib.sha256(json.dumps(pinned, sort_keys=True).encode()).hexdigest()


def _result(task: LoadedTask, ours: TaskScores, theirs: TaskScores) -> TaskResult:
    entry = task.pinned.entry
    by_name = {(item.name, item.filter): item for item in theirs.metrics}
    metrics = [
        compared(item, by_name[item.name, item.filter])
        for item in ours.metrics
        if (item.name, item.filter) in by_name
    ]  # fmt: skip
    main = next((place for place, item in enumerate(metrics) if item.name == entry.metric), 0)
    return TaskResult(
        name=task.pinned.name, file=task.pinned.file, version=ours.version, data=task.data, samples=ours.samples,
        shots=ours.shots, chat=entry.chat, cut=ours.cut, main=main, runtime=f"{ours.runtime} ({ours.runtime_version})",
        source_runtime=f"{theirs.runtime} ({theirs.runtime_version})", metrics=tuple(metrics),
        identity=task.pinned.identity,
    )  # fmt: skip


def _write(folder: Path, text: str) -> None:
    (folder / FILE).write_text(text, encoding="utf-8")


def _read(cache: Cache, key: str) -> TaskScores | None:
    """The scores in the cache; None, and the entry dropped, if they are not there or damaged."""
    try:
        return TaskScores.model_validate_json((cache.entry(KIND, key) / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError):
        cache.remove(KIND, key)
        return None
