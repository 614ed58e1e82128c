"""The tasks of a recipe before the harness is loaded: their files and data sets, checked, and pinned by content.

In: the `tasks` of a recipe's evaluation. Out: PinnedTasks. A task file is the harness's YAML without what runs code or
fetches it: it can't name functions, metrics from the hub, or other files than its data. The harness's own tasks come
with it, and are trusted as it is; harness.py looks them up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quantize.errors import MissingExtraError, RecipeError, first_line
from quantize.recipe.evaluation import TaskEntry
from quantize.recipe.yaml import Document, Location, read_document, suggest
from quantize.system.cache import Cache
from quantize.system.digest import canonical_hash
from quantize.system.lookup import find_path

DISTRIBUTION, EXTRA = "lm_eval", "tasks"
HARNESS = "lm-evaluation-harness"
LOCAL = ("json", "csv", "parquet", "text")  # builders of `datasets` that read local files
KEYS = (
    "task", "task_alias", "tag", "dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split",
    "test_split", "fewshot_split", "fewshot_config", "doc_to_text", "doc_to_target", "doc_to_choice", "description",
    "target_delimiter", "fewshot_delimiter", "gen_prefix", "num_fewshot", "metric_list", "output_type",
    "generation_kwargs", "repeats", "filter_list", "should_decontaminate", "doc_to_decontamination_query", "metadata",
)  # fmt: skip
GROUP_KEYS = ("group", "task", "metadata")  # none that aggregates: each task has its own figures
NEEDED = ("task", "dataset_path", "output_type", "doc_to_text", "doc_to_target")
FEWSHOT_KEYS = ("sampler", "split", "samples", "fewshot_indices", "doc_to_text", "doc_to_choice", "doc_to_target")
FOLDER_KEYS = ("data_files", "split", "field", "delimiter", "column_names", "sep")
EXAMPLE = "dataset_kwargs: {data_files: {test: rows.jsonl}}"


@dataclass(frozen=True)
class PinnedTask:
    """A task by content. config: what its file holds, with whole paths; empty for one of the harness's own.

    files: local data, name -> sha256. identity: names the task, its data and how it is asked; not the harness.
    """

    entry: TaskEntry
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    identity: str = ""

    @property
    def file(self) -> str:
        """The name of its file; "" for a task of the harness's own."""
        return "" if self.entry.file is None else Path(self.entry.file).name


def harness_version() -> str:
    """The version of the harness that is installed. Raises MissingExtraError: none is."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError as exc:
        raise MissingExtraError(f"`evaluation: tasks` ({HARNESS})", EXTRA) from exc


def pin_tasks(entries: Sequence[TaskEntry], recipe: Path, cache: Cache) -> tuple[PinnedTask, ...]:
    """Read the task files and hash the data. recipe: the file that names them, beside which they are looked for.

    Raises RecipeError: a file is not there, is no task, or does not say what its data are. MissingExtraError.
    """
    if entries:
        harness_version()
    found = tuple(task for entry in entries for task in _pinned(entry, recipe, cache))
    for place, task in enumerate(found):
        if task.identity in {other.identity for other in found[:place]}:
            raise RecipeError(f"{recipe}: `tasks`: {task.entry.label} is here twice", hint="remove one of the two")
    return found


def _pinned(entry: TaskEntry, recipe: Path, cache: Cache) -> list[PinnedTask]:
    """The task of an entry, or those of the group that it names."""
    if entry.file is None:
        return [PinnedTask(entry, entry.label, identity=canonical_hash({"entry": _asked(entry)}))]
    path = find_path(entry.file, recipe.parent)
    if path is None or not path.is_file():
        hint = "paths start at the recipe's folder, the one above it, or the working folder"
        raise RecipeError(f"{recipe}: `tasks`: no such file: {entry.file}", hint=hint)
    document = read_document(path)
    if isinstance(document.data, dict) and "group" in document.data:
        members = [(entry.model_copy(update={"file": str(file)}), read_document(file)) for file in _group(document)]
        return [_of_file(member, config, cache) for member, config in members]
    return [_of_file(entry, document, cache)]


def _asked(entry: TaskEntry) -> dict[str, Any]:
    """What of an entry says what is asked."""
    return entry.model_dump(mode="json", exclude={"file", "metric"})


def _group(document: Document) -> list[Path]:
    """The task files of a group, beside it. Raises RecipeError: it is none of task files."""
    _known_keys(document, (), GROUP_KEYS)
    named, folder = document.data.get("task"), Path(document.path).parent
    if not isinstance(named, list) or not named:
        raise document.error((), "a group lists its tasks", hint="write `task: [first.yaml, second.yaml]`")
    found = []
    for place, name in enumerate(named):
        if not isinstance(name, str) or not (folder / name).is_file():
            hint = "a group of yours lists task files, by paths from its folder; name the harness's tasks in the recipe"
            raise document.error(("task", place), f"no such task file: {name}", hint=hint)
        found.append(folder / name)
    return found


def _of_file(entry: TaskEntry, document: Document, cache: Cache) -> PinnedTask:
    _check(document)
    path, config = Path(document.path), dict(document.data)
    where = _data(document, entry)
    files = {name: cache.sha256(item) for name, item in where.items()}
    said = {key: value for key, value in config.items() if key != "dataset_kwargs"}
    options = dict(config.get("dataset_kwargs") or {})
    if where:
        named = options.pop("data_files")
        options["data_files"] = _with_paths(named, where)
        said["data"] = {"files": files, "named": named, "options": _without(options, "data_files")}
    try:
        identity = canonical_hash({"entry": _asked(entry), "config": said})
    except (ValueError, TypeError) as exc:
        message = f"{path}:1:1: a task file has text, numbers, lists and keys only ({first_line(exc)})"
        raise RecipeError(message, hint="put dates between quotes") from exc
    return PinnedTask(entry, str(config["task"]), {**config, "dataset_kwargs": options}, files, identity)


def _check(document: Document) -> None:
    """Raises RecipeError: it is no task, or one that would run or fetch code."""
    data = document.data
    if not isinstance(data, dict):
        raise document.error((), "expected the keys of a task", hint=f"needed: {', '.join(NEEDED)}")
    _known_keys(document, (), KEYS)
    for key in NEEDED:
        if data.get(key) is None:
            raise document.error((), f"key `{key}` is missing: a task of {HARNESS} has it", hint=f"write `{key}: …`")
    for key in ("task", "dataset_path", "output_type"):
        if not isinstance(data[key], str):
            raise document.error((key,), f"`{key}`: expected text")
    if not (data.get("test_split") or data.get("validation_split")):
        raise document.error((), "it names no split to measure on", hint="write `test_split: test`")
    for key, keys in (("fewshot_config", FEWSHOT_KEYS), ("dataset_kwargs", (*FOLDER_KEYS, "revision"))):
        if data.get(key) is not None:
            if not isinstance(data[key], dict):
                raise document.error((key,), f"`{key}`: expected keys and values here")
            _known_keys(document, (key,), keys)
    metrics = data.get("metric_list")
    for index, item in enumerate(metrics if isinstance(metrics, list) else []):
        if not isinstance(item, dict) or not isinstance(item.get("metric"), str):
            raise document.error(("metric_list", index), "a metric has a name", hint="write `- {metric: acc}`")
        if "hf_evaluate" in item:
            hint = f"take one of the metrics that {HARNESS} has itself"
            raise document.error(("metric_list", index, "hf_evaluate"), "metrics are not fetched", hint=hint, key=True)


def _known_keys(document: Document, at: Location, known: Sequence[str]) -> None:
    data = document.data
    for step in at:
        data = data[step]
    for key in data:
        if key not in known:
            raise document.error((*at, key), f"a task file can't have `{key}`", hint=suggest(key, [*known]), key=True)


def _data(document: Document, entry: TaskEntry) -> dict[str, Path]:
    """The local files by name; none for a data set of the hub, which a revision pins. Raises RecipeError."""
    data, folder = document.data, Path(document.path).parent
    options = data.get("dataset_kwargs") or {}
    if data["dataset_path"] not in LOCAL:
        if entry.revision is None:
            known = f"local files are read with `dataset_path: {LOCAL[0]}` and `{EXAMPLE}`"
            message = f"the data set {data['dataset_path']} is not pinned"
            hint = f"write `revision: <its commit on the hub>` beside `file:` in the recipe; {known}"
            raise document.error(("dataset_path",), message, hint=hint)
        if "data_files" in options or "revision" in options:
            raise document.error(("dataset_kwargs",), "of a data set of the hub the recipe's `revision` says all")
        return {}
    if entry.revision is not None:
        raise document.error(("dataset_path",), "local files have no `revision`", hint="remove it from the recipe")
    names = _names(options.get("data_files"))
    if not names:
        raise document.error(("dataset_path",), "it does not say which files its data are", hint=f"write `{EXAMPLE}`")
    found = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            at: Location = ("dataset_kwargs", "data_files")
            raise document.error(at, f"no such file: {name}", hint="paths start at the task file's folder")
        found[name] = path.resolve()
    return found


def _names(named: Any) -> list[str]:
    if isinstance(named, str):
        return [named]
    if isinstance(named, dict):
        return [name for item in named.values() for name in _names(item)]
    return [name for item in named for name in _names(item)] if isinstance(named, list) else []


def _with_paths(named: Any, where: Mapping[str, Path]) -> Any:
    if isinstance(named, str):
        return str(where[named])
    if isinstance(named, dict):
        return {key: _with_paths(item, where) for key, item in named.items()}
    return [_with_paths(item, where) for item in named]


def _without(options: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != key}
