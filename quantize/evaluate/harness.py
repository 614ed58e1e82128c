"""lm-evaluation-harness: its tasks, and what a model reaches on one, by its own evaluator.

In: PinnedTasks, a Runtime. Out: LoadedTasks; TaskScores. Import it late: it needs the harness. What makes figures
differ from run to run is fixed: seeds, the number of resamples, one process. Templates are rendered in jinja2's
sandbox.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import lm_eval
import numpy as np
from jinja2 import BaseLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval import utils
from lm_eval.api.metrics import mean
from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from quantize.errors import QuantizeError, RecipeError, first_line, is_disk_full, is_out_of_memory
from quantize.evaluate.task_files import HARNESS, LOCAL, PinnedTask, harness_version
from quantize.evaluate.task_model import RuntimeModel
from quantize.evaluate.task_names import find_own
from quantize.evaluate.task_record import MetricScores, TaskData, TaskScores

SEED = 1234  # of the choice of examples; the harness's own default
RESAMPLES = 1000  # of its bootstrap
GENERATES = "generate_until"
STRUCTURE = ("tag", "group", "task_list")  # keys that say where a task belongs
PIN_LINE = "write a task file over local files, or name a task that is one data set of the hub"


@dataclass(frozen=True)
class LoadedTask:
    """A task, and the harness's object for it."""

    pinned: PinnedTask
    task: Any

    @property
    def generates(self) -> bool:
        """Whether a model answers in its own words."""
        return bool(self.task.OUTPUT_TYPE == GENERATES)

    @property
    def data(self) -> TaskData:
        """Its data set, for the record."""
        config = self.task.config
        return TaskData(
            path=str(config.dataset_path), name=config.dataset_name or "", revision=self.pinned.entry.revision,
            files=dict(self.pinned.files),
        )  # fmt: skip


def load_tasks(pinned: tuple[PinnedTask, ...]) -> tuple[LoadedTask, ...]:
    """Make the harness's tasks, with their data. Raises RecipeError: one can't be made, or its data can't be had."""
    environment = ImmutableSandboxedEnvironment(
        loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["regex_replace"] = utils.regex_replace
    utils.env = environment
    return tuple(LoadedTask(item, _made(item)) for item in pinned)


def run_task(loaded: LoadedTask, model: RuntimeModel, runtime: tuple[str, str]) -> TaskScores:
    """What a model reaches. runtime: its name and version. Raises UsageError, RecipeError, VerifyError."""
    task, entry = loaded.task, loaded.pinned.entry
    before = model.cut
    _seed(task)
    with _translated(loaded.pinned, "can't be scored"), _one_process():
        found = lm_eval.evaluate(
            model, {"tasks": {task.task_name: task}}, limit=entry.limit, bootstrap_iters=RESAMPLES, log_samples=True,
            apply_chat_template=entry.chat, fewshot_as_multiturn=entry.chat,
        )  # fmt: skip
    name = task.task_name
    metrics = tuple(_metrics(task, found["results"][name], found["samples"][name]))
    if not metrics:
        raise RecipeError(f"`tasks`: {entry.label}: the harness gives no figure for it", hint="add a `metric_list`")
    version = found["versions"].get(name)
    return TaskScores(
        runtime=runtime[0], runtime_version=runtime[1],
        version="" if version in (None, ConfigurableTask.VERSION) else str(version),
        samples=int(found["n-samples"][name]["effective"]), shots=int(found["n-shot"].get(name, 0) or 0),
        cut=model.cut - before, metrics=metrics,
    )  # fmt: skip


class _PinnedData(ConfigurableTask):  # type: ignore[misc]
    """The harness's task with its data set as pinned; an error that says which can't be had."""

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Load the data: from the hub through its own cache; local files as they are now. Raises RecipeError."""
        options, path = dict(dataset_kwargs or {}), self.DATASET_PATH
        try:
            if path in LOCAL:
                with tempfile.TemporaryDirectory(prefix="quantize-tasks-") as folder:
                    super().download({**options, "cache_dir": folder, "keep_in_memory": True})
            else:
                super().download(options)
        except Exception as exc:
            if is_disk_full(exc) or is_out_of_memory(exc):
                raise
            what = path if path in LOCAL else f"{path}@{options.get('revision')}"
            hint = "check the data files" if path in LOCAL else "check name and revision, the network, `hf auth login`"
            why = first_line(exc.__cause__ or exc)
            message = f"`tasks`: {self.config.task}: its data set {what} can't be had ({why})"
            raise RecipeError(message, hint=hint) from exc


def _made(pinned: PinnedTask) -> Any:
    config = deepcopy(dict(pinned.config)) if pinned.file else _own_config(pinned)
    for key in STRUCTURE:
        config.pop(key, None)
    if not pinned.file or pinned.entry.revision:
        config["dataset_kwargs"] = {**(config.get("dataset_kwargs") or {}), "revision": pinned.entry.revision}
    if pinned.file:
        _check_metrics(pinned, config)
    with _translated(pinned, "can't be made"):
        task = _PinnedData(config=config)
        _check_asked(pinned, task)
        _seed(task)
        task.build_all_requests(limit=pinned.entry.limit)  # each row once, before any model is loaded
    return task


def _own_config(pinned: PinnedTask) -> dict[str, Any]:
    """What the harness has under a name. Raises RecipeError: nothing, or what can't be pinned."""
    name = pinned.entry.label
    path = find_own(name)
    plain = load_yaml(path, resolve_func=False)
    where = f"`tasks`: {name} of {HARNESS} {harness_version()}"
    if "class" in plain or plain.get("custom_dataset") is not None or plain.get("dataset_path") in (None, *LOCAL):
        raise RecipeError(f"{where}: its data set is none of the hub that a revision pins", hint=PIN_LINE)
    if plain.get("unsafe_code"):
        raise RecipeError(f"{where} runs code that the model writes, which is not done here", hint="leave it out")
    config: dict[str, Any] = load_yaml(path, resolve_func=True)
    return config


def _check_metrics(pinned: PinnedTask, config: dict[str, Any]) -> None:
    """Raises RecipeError: a metric that the harness would fetch from the hub."""
    for item in config.get("metric_list") or ():
        for key, known in (("metric", METRIC_REGISTRY), ("aggregation", AGGREGATION_REGISTRY)):
            if key in item and item[key] not in known:
                near = get_close_matches(str(item[key]), list(known), n=3)
                hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
                raise RecipeError(f"{pinned.file}: {HARNESS} has no {key} {item[key]}", hint=hint)


def _check_asked(pinned: PinnedTask, task: Any) -> None:
    """Hold what the recipe asks for against the task, and set it. Raises RecipeError."""
    entry, where = pinned.entry, f"`tasks`: {pinned.entry.label}"
    options = task.config.generation_kwargs or {}
    if task.OUTPUT_TYPE == GENERATES and (options.get("do_sample") or float(options.get("temperature") or 0) > 0):
        raise RecipeError(f"{where}: its answers are sampled, and only greedy ones can be compared")
    if getattr(task, "MULTIMODAL", False):
        raise RecipeError(f"{where}: it asks about images or sound, which no runtime here is given")
    if entry.metric is not None and entry.metric not in task.aggregation():
        raise RecipeError(f"{where} has no metric {entry.metric}", hint=f"it has {', '.join(task.aggregation())}")
    own = task.get_config("num_fewshot")
    if entry.shots is not None and own == 0 and entry.shots:
        raise RecipeError(f"{where}: the task itself is for 0 shots", hint="leave `shots` out")
    task.set_config("num_fewshot", (own or 0) if entry.shots is None else entry.shots)


def _metrics(task: Any, figures: dict[str, Any], samples: list[dict[str, Any]]) -> Iterator[MetricScores]:
    """In the order of the task's own list."""
    better = task.higher_is_better()
    for key, value in figures.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, (int, float, np.number)):
            continue
        rows = sorted((row for row in samples if row["filter"] == kind and name in row), key=lambda row: row["doc_id"])
        each = [row[name] for row in rows]
        is_mean = task.aggregation().get(name, mean) is mean and all(
            isinstance(item, (int, float, np.number, np.bool_)) for item in each
        )
        scores = tuple(float(item) for item in each) if is_mean else ()
        error = figures.get(f"{name}_stderr,{kind}")
        yield MetricScores(
            name=name, filter=kind, value=float(value),
            stderr=float(error) if isinstance(error, (int, float, np.number)) else None,
            higher_is_better=better.get(name) is not False, scores=scores,
            is_share=bool(scores) and all(0 <= item <= 1 for item in scores),
        )  # fmt: skip


def _seed(task: Any) -> None:
    random.seed(SEED)
    np.random.seed(SEED)
    task.set_fewshot_seed(seed=SEED)


@contextmanager
def _translated(pinned: PinnedTask, what: str) -> Iterator[None]:
    """What the harness raises of a task, as an error that names the task."""
    try:
        yield
    except QuantizeError:
        raise
    except Exception as exc:
        if is_disk_full(exc) or is_out_of_memory(exc):
            raise
        why = f"{type(exc).__name__}: {first_line(exc)}"
        hint = "check its keys, and that each row of the data has what its templates name"
        message = f"`tasks`: {pinned.file or pinned.entry.label} {what} by {HARNESS} ({why})"
        raise RecipeError(message, hint=hint if pinned.file else None) from exc


@contextmanager
def _one_process() -> Iterator[None]:
    """The harness resamples in as many processes as there are cores, unless it is told not to."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
