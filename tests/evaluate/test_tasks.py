"""Tasks of lm-evaluation-harness: our runtimes against the harness's own model class, on rows written for this."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from quantize.build.outcome import OutcomeState
from quantize.errors import MissingExtraError, RecipeError, UsageError
from quantize.evaluate import task_files
from quantize.evaluate.decision import GateOutcome, GateThresholds
from quantize.evaluate.gates import TASK_SCORES, decide
from quantize.evaluate.intervals import paired_difference
from quantize.evaluate.numbers import Interval
from quantize.evaluate.record import EvaluationRecord, Evidence
from quantize.evaluate.task_files import PinnedTask, pin_tasks
from quantize.evaluate.task_record import TaskData, TaskMetric, TaskResult, TasksRecord, compare_tasks
from quantize.evaluate.task_table import task_lines, task_rows, task_verdict
from quantize.events import ListReporter, SilentReporter
from quantize.formats import open_runtime, option_models
from quantize.recipe.evaluation import TaskEntry
from quantize.recipe.model import load_recipe
from quantize.runtimes.base import ModelRef
from quantize.store.artifact import Artifact
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.testing import write_recipe
from tests.conftest import Built, Run, build

pytest.importorskip("torch")
pytest.importorskip("llama_cpp")
pytest.importorskip("lm_eval")
CONTEXT = 128
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHOICES: dict[str, Any] = {
    "task": "own_choices",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "data/rows.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": "right",
    "doc_to_choice": "answers",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
    "metadata": {"version": 2.0},
}
ANSWERS: dict[str, Any] = {
    **{key: CHOICES[key] for key in ("dataset_path", "dataset_kwargs", "test_split")},
    "task": "own_answers",
    "output_type": "generate_until",
    "generation_kwargs": {"until": ["e", "."], "max_gen_toks": 40},
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{said}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
TEXTS: dict[str, Any] = {
    **{key: CHOICES[key] for key in ("dataset_path", "dataset_kwargs", "test_split")},
    "task": "own_texts",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{(question + ' ' + answers[1] + '. ') * 9}}",
    "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
}
THINGS = ("cat", "river", "stone", "light", "house", "apple", "window", "letter", "train", "garden", "winter", "bell")


def rows() -> list[dict[str, Any]]:
    """Questions without sense: a model with random weights rates and answers them as well as any other."""
    found = []
    for place, thing in enumerate(THINGS):
        other, third = THINGS[(place + 5) % len(THINGS)], THINGS[(place + 7) % len(THINGS)]
        answers = [other, f"{third} and the {thing}", f"old {third}", "A"]
        question = f"The {thing} stands beside the {other}. What is next to it? The"
        found.append({"question": question, "answers": answers, "right": place % 4, "said": other})
    return found


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Task files and their data, as a user has them beside a recipe."""
    root = tmp_path / "tasks"
    (root / "data").mkdir(parents=True)
    write_rows(root, rows())
    for config in (CHOICES, ANSWERS, TEXTS):
        write_task(root, config)
    return root


def write_rows(root: Path, found: list[dict[str, Any]]) -> None:
    (root / "data" / "rows.jsonl").write_text("\n".join(map(json.dumps, found)))


def write_task(root: Path, config: dict[str, Any], name: str = "") -> str:
    name = f"{name or config['task']}.yaml"
    (root / name).write_text(yaml.safe_dump(config, sort_keys=False))
    return name


def pinned(root: Path, cache: Cache, *entries: TaskEntry) -> tuple[PinnedTask, ...]:
    return pin_tasks(entries, root / "recipe.yaml", cache)


def loaded(root: Path, cache: Cache, entry: TaskEntry) -> Any:
    from quantize.evaluate.tasks import load

    (task,) = load(pinned(root, cache, entry))
    return task


def ours(model: ModelRef, tokenizer: Path, task: Any) -> tuple[Any, list[Any]]:
    """Scores, and what the model said to each request."""
    from quantize.evaluate.harness import run_task
    from quantize.evaluate.task_model import RuntimeModel

    with closing(open_runtime(model, context=CONTEXT)) as runtime:
        asked = RuntimeModel(runtime, tokenizer, CONTEXT, SilentReporter(), "task")
        scores = run_task(task, asked, (runtime.name, runtime.version))
    return scores, said(task)


def said(task: Any) -> list[Any]:
    return [item.resps[0] for item in task.task.instances]


def by_the_harness(checkpoint: Path, task: Any) -> tuple[dict[str, Any], list[Any]]:
    """The same of the harness's own model class on the same checkpoint."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from quantize.evaluate.harness import SEED

    model = HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu", batch_size=1, max_length=CONTEXT)
    task.task.set_fewshot_seed(seed=SEED)
    chat = task.pinned.entry.chat
    found = lm_eval.evaluate(
        model, {"tasks": {task.task.task_name: task.task}}, bootstrap_iters=100, apply_chat_template=chat,
        fewshot_as_multiturn=chat, limit=task.pinned.entry.limit,
    )  # fmt: skip
    return found["results"][task.task.task_name], said(task)


@pytest.mark.filterwarnings("ignore")  # of the harness's own class
@pytest.mark.parametrize(
    "entry",
    [
        TaskEntry(file="own_choices.yaml"),
        TaskEntry(file="own_choices.yaml", shots=2, limit=7),
        TaskEntry(file="own_choices.yaml", chat=True, shots=1),
        TaskEntry(file="own_texts.yaml"),
    ],
    ids=["plain", "two examples", "chat", "whole texts"],
)
def test_figures_are_those_of_the_harness_s_own_class(tiny: Path, folder: Path, cache: Cache, entry: TaskEntry) -> None:
    task = loaded(folder, cache, entry)
    scores, each = ours(ModelRef(tiny, "safetensors"), tiny, task)
    expected, theirs = by_the_harness(tiny, task)
    for metric in scores.metrics:
        assert metric.value == pytest.approx(expected[f"{metric.name},none"], rel=1e-5)
        error = expected[f"{metric.name}_stderr,none"]
        assert (metric.stderr if error != "N/A" else "N/A") == pytest.approx(error)
    flat = [item[0] if isinstance(item, tuple) else item for item in each]
    assert flat == pytest.approx([item[0] if isinstance(item, tuple) else item for item in theirs], rel=1e-5)
    assert len({round(value, 3) for value in flat}) > len(flat) // 2, "the model tells them apart"


@pytest.mark.filterwarnings("ignore")
def test_answers_are_those_of_the_harness_s_own_class(tiny: Path, folder: Path, cache: Cache) -> None:
    """Half of the right answers are what the model says, so that there is something to get right, and wrong."""
    entry = TaskEntry(file="own_answers.yaml")
    _, theirs = by_the_harness(tiny, loaded(folder, cache, entry))
    known = [
        {**row, "said": text if place % 2 else "no"}
        for place, (row, text) in enumerate(zip(rows(), theirs, strict=True))
    ]
    write_rows(folder, known)
    task = loaded(folder, cache, entry)
    scores, each = ours(ModelRef(tiny, "safetensors"), tiny, task)
    expected, again = by_the_harness(tiny, task)
    assert each == again == theirs
    (metric,) = scores.metrics
    assert metric.value == expected["exact_match,none"] == 0.5
    assert metric.scores == (0.0, 1.0) * 6


@pytest.mark.filterwarnings("ignore")
def test_a_gguf_file_says_nearly_what_its_source_says(tiny: Path, built: Built, folder: Path, cache: Cache) -> None:
    """Against the harness's class on the checkpoint; the nearer the more bits."""
    task = loaded(folder, cache, TaskEntry(file="own_choices.yaml"))
    expected = np.array([value for value, _ in by_the_harness(tiny, task)[1]])
    apart = {}
    for kind in ("q8_0", "q4_k_m"):
        (path,) = [path for path in built.root.glob("artifacts/**/*.gguf") if kind in str(path).lower()]
        _, each = ours(ModelRef(path.parent, "gguf", path.name), tiny, task)
        apart[kind] = np.abs(np.array([value for value, _ in each]) - expected).mean()
    assert 0 < apart["q8_0"] < 0.05 < apart["q4_k_m"]


def test_what_is_too_long_loses_its_beginning_and_is_counted(tiny: Path, folder: Path, cache: Cache) -> None:
    write_rows(folder, [{**row, "question": row["question"] * 9} for row in rows()])
    scores, each = ours(ModelRef(tiny, "safetensors"), tiny, loaded(folder, cache, TaskEntry(file="own_choices.yaml")))
    assert scores.cut == len(each) == 48
    scores, _ = ours(ModelRef(tiny, "safetensors"), tiny, loaded(folder, cache, TaskEntry(file="own_answers.yaml")))
    assert scores.cut == 12


# --- what the recipe and the task files say ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"task": "arc_easy"}, "without the commit of its data set"),
        ({"task": "arc_easy", "file": "x.yaml"}, "and not both"),
        ({}, "and not both"),
        ({"task": "arc_easy", "revision": "main"}, "revision"),
    ],
)
def test_an_entry_that_pins_nothing_is_refused(tmp_path: Path, tiny: Path, entry: Any, words: str) -> None:
    path = write_recipe(tmp_path / "r.yaml", tiny, [{"format": "gguf", "type": "Q8_0"}], evaluation={"tasks": [entry]})
    with pytest.raises(RecipeError, match=words):
        load_recipe(path, option_models())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"doc_to_text": None}, "`doc_to_text` is missing"),
        ({"include": "/etc/passwd"}, "can't have `include`"),
        ({"process_docs": "utils.docs"}, "can't have `process_docs`"),
        ({"unsafe_code": True}, "can't have `unsafe_code`"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "metrics are not fetched"),
        ({"dataset_path": "allenai/ai2_arc"}, "is not pinned"),
        ({"dataset_kwargs": {"data_files": "https://example.org/rows.jsonl"}}, "no such file"),
        ({"dataset_kwargs": {"data_files": "data/none.jsonl"}}, "no such file: data/none.jsonl"),
        ({"dataset_kwargs": {"trust_remote_code": True}}, "can't have `trust_remote_code`"),
        ({"dataset_kwargs": None}, "does not say which files"),
        ({"test_split": None}, "names no split"),
    ],
)
def test_a_task_file_that_is_none(folder: Path, cache: Cache, change: dict[str, Any], words: str) -> None:
    name = write_task(folder, {**CHOICES, **change}, "other")
    with pytest.raises(RecipeError, match=words) as caught:
        pinned(folder, cache, TaskEntry(file=name))
    assert "other.yaml:" in str(caught.value)


def write_group(root: Path, members: Any, **more: Any) -> str:
    (root / "group.yaml").write_text(yaml.safe_dump({"group": "mine", "task": members, **more}, sort_keys=False))
    return "group.yaml"


def test_a_group_of_task_files_is_its_tasks(folder: Path, cache: Cache) -> None:
    entry = TaskEntry(file=write_group(folder, ["own_choices.yaml", "own_texts.yaml"]), limit=5)
    found = pinned(folder, cache, entry)
    alone = pinned(folder, cache, *(TaskEntry(file=f"own_{name}.yaml", limit=5) for name in ("choices", "texts")))
    assert [item.identity for item in found] == [item.identity for item in alone]
    assert [(item.name, item.file) for item in found] == [
        ("own_choices", "own_choices.yaml"), ("own_texts", "own_texts.yaml"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("members", "more", "words"),
    [
        (["own_choices.yaml", "mmlu"], {}, r"group.yaml:4:3: no such task file: mmlu"),
        ([], {}, "a group lists its tasks"),
        (["own_choices.yaml"], {"aggregate_metric_list": [{"metric": "acc"}]}, "can't have `aggregate_metric_list`"),
        (["group.yaml"], {}, "can't have `group`"),
    ],
)
def test_a_group_that_is_none(folder: Path, cache: Cache, members: Any, more: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        pinned(folder, cache, TaskEntry(file=write_group(folder, members, **more)))


def test_a_task_file_can_name_no_function(folder: Path, cache: Cache) -> None:
    text = (folder / "own_choices.yaml").read_text().replace("doc_to_choice: answers", "doc_to_choice: !function a.b")
    (folder / "other.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"the tag '!function'"):
        pinned(folder, cache, TaskEntry(file="other.yaml"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"doc_to_text": "{{nothing}}"}, "'nothing' is undefined"),
        ({"doc_to_text": "{{ question.__class__.__mro__ }}"}, "SecurityError"),
        ({"metric_list": [{"metric": "acccc"}]}, "has no metric acccc"),
        ({"metric_list": [{"metric": "acc", "aggregation": "average"}]}, "has no aggregation average"),
        ({"test_split": "train"}, "KeyError: 'train'"),
        ({"output_type": "poem"}, "invalid output_type"),
    ],
)
def test_a_task_that_the_harness_can_t_make(folder: Path, cache: Cache, change: dict[str, Any], words: str) -> None:
    name = write_task(folder, {**CHOICES, **change}, "other")
    with pytest.raises(RecipeError, match=words) as caught:
        loaded(folder, cache, TaskEntry(file=name))
    assert "other.yaml" in str(caught.value)


def test_a_task_file_is_found_from_the_working_folder_too(
    folder: Path, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by the recipe that an artifact carries, in the store."""
    entry, elsewhere = TaskEntry(file="own_choices.yaml"), tmp_path / "store" / "tiny" / "recipe.yaml"
    with pytest.raises(RecipeError, match=r"recipe.yaml: `tasks`: no such file: own_choices.yaml"):
        pin_tasks([entry], elsewhere, cache)
    monkeypatch.chdir(folder)
    assert pin_tasks([entry], elsewhere, cache) == pinned(folder, cache, entry)


def test_sampled_answers_are_refused(folder: Path, cache: Cache) -> None:
    name = write_task(folder, {**ANSWERS, "generation_kwargs": {"until": ["."], "do_sample": True}}, "other")
    with pytest.raises(RecipeError, match="its answers are sampled"):
        loaded(folder, cache, TaskEntry(file=name))


def test_names_that_the_harness_does_not_have(folder: Path, cache: Cache) -> None:
    with pytest.raises(RecipeError, match="has no task arc_eazy") as caught:
        loaded(folder, cache, TaskEntry(task="arc_eazy", revision=COMMIT))
    assert "arc_easy" in str(caught.value.hint)
    for group in ("mmlu", "ai2_arc"):
        with pytest.raises(RecipeError, match=f"{group} is a group of tasks"):
            loaded(folder, cache, TaskEntry(task=group, revision=COMMIT))
    with pytest.raises(RecipeError, match=r"arc_easy: its data set allenai/ai2_arc@0123456789.* can't be had"):
        loaded(folder, cache, TaskEntry(task="arc_easy", revision=COMMIT))


HUB_ROWS: dict[str, dict[str, Any]] = {
    "arc_easy": {
        "question": "What is ice made of?", "answerKey": "B",
        "choices": {"text": ["sand", "water", "wood", "air"], "label": ["A", "B", "C", "D"]},
    },
    "arc_challenge": {  # a file that includes another
        "question": "What is ice made of?", "answerKey": "B",
        "choices": {"text": ["sand", "water", "wood", "air"], "label": ["A", "B", "C", "D"]},
    },
    "hellaswag": {  # with functions of the harness's own
        "activity_label": "Cooking", "ctx_a": "She takes an egg.", "ctx_b": "then she", "label": "1", "ind": 0,
        "endings": ["flies.", "breaks it.", "sings to it.", "sleeps."],
    },
    "gsm8k": {"question": "Tom has 2 pens and buys 2. How many?", "answer": "2 + 2 = 4\n#### 4"},
}  # fmt: skip


@pytest.mark.parametrize("name", HUB_ROWS)
def test_a_task_of_the_harness_s_own_gets_its_data_at_the_commit(
    name: str, tiny: Path, folder: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is stood in for by rows of the same form; everything else is the harness's."""
    import datasets

    asked: list[dict[str, Any]] = []

    def load_dataset(**given: Any) -> Any:
        asked.append(given)
        row = HUB_ROWS[name]
        first = next(iter(row))  # some text: an example must be another row than the question
        rows_of_split = datasets.Dataset.from_list([{**row, first: f"{place}: {row[first]}"} for place in range(6)])
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows_of_split))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    task = loaded(folder, cache, TaskEntry(task=name, revision=COMMIT, limit=3, shots=1))
    assert [item["revision"] for item in asked] == [COMMIT]
    assert task.data.revision == COMMIT
    assert task.data.path == asked[0]["path"]
    model = ModelRef(tiny, "safetensors")
    if task.generates:  # 256 tokens of an answer need more room than the tests give
        task.task.config.generation_kwargs["max_gen_toks"] = 16
    scores, each = ours(model, tiny, task)
    assert (scores.samples, scores.shots) == (3, 1)
    assert len(each) == 3 * (1 if task.generates else 4)
    names = {"gsm8k": {"exact_match"}}.get(name, {"acc", "acc_norm"})
    assert {metric.name for metric in scores.metrics} == names
    assert float(scores.version) >= 1


def test_without_the_extra(folder: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_files, "DISTRIBUTION", "no-such-distribution")
    assert pinned(folder, cache) == ()
    with pytest.raises(MissingExtraError, match="lm-evaluation-harness") as caught:
        pinned(folder, cache, TaskEntry(file="own_choices.yaml"))
    assert "[tasks]" in str(caught.value.hint)


def test_what_names_a_task(folder: Path, cache: Cache) -> None:
    """Its file, its data and how it is asked; not where it lies, nor which metric is looked at."""

    def identity(root: Path, **given: Any) -> str:
        (task,) = pinned(root, cache, TaskEntry(file="own_choices.yaml", **given))
        return task.identity

    first = identity(folder)
    assert identity(Path(shutil.copytree(folder, folder.with_name("moved")))) == first
    assert identity(folder, metric="acc_norm") == first
    others = [identity(folder, limit=5), identity(folder, shots=1), identity(folder, chat=True)]
    write_rows(folder, rows()[::-1])
    others.append(identity(folder))
    write_task(folder, {**CHOICES, "doc_to_text": "Q: {{question}}"})
    others.append(identity(folder))
    assert len({first, *others}) == 6
    with pytest.raises(RecipeError, match="is here twice"):
        pinned(folder, cache, *[TaskEntry(file="own_choices.yaml")] * 2)


# --- differences and the gate -----------------------------------------------------------------------------------------


def test_the_interval_of_a_difference_holds_what_it_says() -> None:
    """Scores drawn with a known difference: 95 % of the intervals hold it, of right and wrong as of other scores."""
    chance = np.random.default_rng(7)
    held = {"right or wrong": 0, "shares": 0}
    for _ in range(100):
        theirs, luck = chance.random(60), chance.random(60)
        ours = np.where(luck < 0.85, theirs, chance.random(60)) - 0.05
        pairs = {"right or wrong": (ours < 0.45, theirs < 0.45), "shares": (ours, theirs)}
        truth = {"right or wrong": 0.85 * 0.05 + 0.15 * 0.05, "shares": -0.05}
        for name, (one, other) in pairs.items():
            low, high = paired_difference([float(x) for x in one], [float(x) for x in other]) or (0, 0)
            held[name] += low <= truth[name] <= high
    assert all(count >= 90 for count in held.values()), held


def test_no_change_in_few_samples_is_no_proof() -> None:
    low, high = paired_difference([1.0] * 20, [1.0] * 20) or (0, 0)
    assert low < -0.05 < 0.05 < high
    assert paired_difference([1.0] * 3, [0.0] * 3) is None


def result(difference: float, half: float | None, *, higher: bool = True) -> TaskResult:
    interval = None if half is None else Interval(low=difference - half, high=difference + half)
    metric = TaskMetric(
        name="acc", filter="none", value=0.6 + difference, stderr=0.02, source_value=0.6, source_stderr=0.02,
        difference=difference, interval=interval, higher_is_better=higher, is_share=True,
    )  # fmt: skip
    return TaskResult(
        name=f"t{difference:+g}", file="", version="1.0", data=TaskData(path="org/set", revision=COMMIT), samples=500,
        shots=0, chat=False, cut=0, main=0, runtime="a", source_runtime="b", metrics=(metric,),
    )  # fmt: skip


def tasks(*results: TaskResult) -> TasksRecord:
    return TasksRecord(version="0.4.13", seed=1234, resamples=1000, context=2048, results=results)


@pytest.mark.parametrize(
    ("results", "outcome", "words"),
    [
        ((result(-0.01, 0.005),), GateOutcome.PASSED, "t-0.01"),
        ((result(-0.05, 0.02), result(0.1, 0.01)), GateOutcome.REFUSED, "t-0.05"),
        ((result(-0.05, 0.04), result(-0.01, 0.005)), GateOutcome.FLAGGED, "lies within the interval"),
        ((result(0.05, 0.02, higher=False),), GateOutcome.REFUSED, "over the limit of 2 points"),
        ((result(-0.05, None),), GateOutcome.FLAGGED, "too few samples"),
        ((), GateOutcome.INSUFFICIENT, "no task was measured"),
    ],
)
def test_the_gate(results: tuple[TaskResult, ...], outcome: GateOutcome, words: str) -> None:
    decision = decide(Evidence(tasks=tasks(*results)), GateThresholds(max_task_loss=0.02))
    (finding,) = [item for item in decision.findings if item.gate == TASK_SCORES]
    assert finding.outcome is outcome
    assert words in finding.reason
    without = decide(Evidence(tasks=tasks(*results)), GateThresholds())
    assert TASK_SCORES not in {item.gate for item in without.findings}


def scored(scores: Sequence[float], **changes: Any) -> TasksRecord:
    value = sum(scores) / len(scores)
    own = {"value": value, "difference": value - 0.6, "scores": tuple(scores)}
    (task,) = (result(0, None),)
    metric = task.main_metric.model_copy(update={**own, **{k: v for k, v in changes.items() if k != "identity"}})
    return tasks(task.model_copy(update={"identity": changes.get("identity", "a" * 64), "metrics": (metric,)}))


@pytest.mark.parametrize(
    ("first", "second", "changes", "verdict"),
    [
        ([1.0] * 90 + [0.0] * 10, [1.0] * 60 + [0.0] * 40, {}, "A is better; B less A: -30.0 ± 9.0 points (95 %)"),
        ([1.0] * 60 + [0.0] * 40, [1.0] * 90 + [0.0] * 10, {}, "B is better; B less A: +30.0 ± 9.0 points (95 %)"),
        ([1.0] * 90 + [0.0] * 10, [1.0] * 60 + [0.0] * 40, {"higher_is_better": False}, "B is better; B less A: -30.0"),
        ([1.0, 0.0] * 50, [0.0, 1.0] * 50, {}, "no difference shown; B less A: +0.0 ± 19.3 points (95 %)"),
    ],
)
def test_two_artifacts_are_compared_sample_by_sample(
    first: list[float], second: list[float], changes: dict[str, Any], verdict: str
) -> None:
    ((task, metric),) = compare_tasks(scored(first, **changes), scored(second, **changes))
    assert task_verdict(task, metric, ("A", "B")).startswith(f"t+0, 0-shot, acc: {verdict}")


def test_tasks_that_were_not_asked_alike_are_not_compared() -> None:
    ours = scored([1.0, 0.0] * 20)
    for other in (scored([1.0] * 40, identity="b" * 64), scored([1.0] * 40, identity=""), scored([1.0] * 20), None):
        assert compare_tasks(ours, other) == []
    assert compare_tasks(ours, scored([1.0] * 40).model_copy(update={"context": 1024})) == []


def test_what_is_shown() -> None:
    (row,) = task_rows(tasks(result(-0.012, 0.008)))
    assert row == ["t-0.012, 0-shot", "acc", "58.8% (2.0)", "60.0% (2.0)", "-1.2 ± 0.8 points"]
    line, _ = task_lines(tasks(result(-0.012, 0.008), result(-0.012, 0.008)))
    assert line == f"t-0.012 (version 1.0): 500 samples of org/set@{COMMIT[:12]}, in a, the source in b"


# --- the whole way ----------------------------------------------------------------------------------------------------


def recipe(folder: Path, tiny: Path, entries: list[dict[str, Any]], **gates: float) -> Path:
    return write_recipe(
        folder / "tiny.yaml", tiny, [{"format": "gguf", "types": ["Q8_0", "Q2_K"]}],
        evaluation={
            "text": "python-docs", "window": 64, "windows": 4, "golden": [], "context": CONTEXT, "tasks": entries,
        },
        gates={"max_kl": 99, "max_perplexity_ratio": 99, **gates},
    )  # fmt: skip


def records(artifacts: list[Artifact | None]) -> dict[str, TasksRecord]:
    found = {}
    for artifact in artifacts:
        assert artifact is not None
        record = EvaluationRecord.model_validate(artifact.measurements()["evaluation"])
        assert record.tasks is not None
        found[artifact.manifest.variant] = record.tasks
    return found


@pytest.mark.filterwarnings("ignore")
def test_a_build_measures_the_tasks_of_its_recipe(tiny: Path, folder: Path, workspace: Workspace, run: Run) -> None:
    """Right is what the source itself finds likeliest, so that it gets all and what is worse loses some."""
    letters = list("abmnotw")  # as many tokens each, so that no answer wins by being short
    alike = [
        {**row, "question": f"{one} {row['question']}", "answers": letters} for row in rows() for one in THINGS[:4]
    ]
    write_rows(folder, alike)
    task = loaded(folder, workspace.cache, TaskEntry(file="own_choices.yaml"))
    each = np.array([value for value, _ in by_the_harness(tiny, task)[1]]).reshape(-1, len(letters))
    known = [{**row, "right": int(best)} for row, best in zip(alike, each.argmax(axis=1), strict=True)]
    write_rows(folder, known)
    write_group(folder, ["own_choices.yaml"])
    path = recipe(folder, tiny, [{"file": "group.yaml"}, {"file": "own_answers.yaml", "limit": 4}])
    reporter = ListReporter()
    outcomes = build(load_recipe(path, option_models()), Workspace(workspace.store, workspace.cache, reporter))
    assert [item.error for item in outcomes if item.error] == []
    found = records([item.artifact for item in outcomes])
    for record in found.values():
        choices, answers = record.results
        assert (choices.name, choices.version, choices.samples, answers.samples) == ("own_choices", "2.0", 48, 4)
        assert choices.data.files == {"data/rows.jsonl": workspace.cache.sha256(folder / "data" / "rows.jsonl")}
        assert choices.main_metric.source_value == 1
        assert choices.source_runtime.startswith("transformers")
        assert choices.runtime.startswith("llama.cpp")
    better, worse = (found[name].results[0].main_metric for name in ("q8_0", "q2_k"))
    assert worse.difference < 0
    assert worse.difference < better.difference <= 0
    assert worse.interval is not None
    assert worse.interval.low < worse.difference
    asked = [event.text for event in reporter.events if "asking the source the task" in event.text]
    assert asked == ["asking the source the task own_choices", "asking the source the task own_answers"]
    page = (outcomes[0].artifact.folder / "evaluation.md").read_text()  # type: ignore[union-attr]
    assert "own_choices, 0-shot | acc |" in page
    shown = run("show", outcomes[0].artifact.ref if outcomes[0].artifact else "").stdout
    assert "own_choices (version 2.0, own_choices.yaml): 48 samples of data/rows.jsonl" in shown

    names = ("tiny/q8_0", "tiny/q2_k")
    lines = [line for line in run("diff", *names).stdout.splitlines() if line.startswith("own_choices, 0-shot, acc: ")]
    (figure,) = [item for item in data_of(run("diff", *names, "--json")) if item["what"].endswith("own_choices.acc")]
    assert (figure["first"], figure["second"]) == (better.value, worse.value)
    assert figure["difference"] == pytest.approx(worse.value - better.value)
    low, high = paired_difference(worse.scores, better.scores) or (0.0, 0.0)
    assert figure["interval"] == [low, high]
    half = f"q2_k less q8_0: {100 * figure['difference']:+.1f} ± {50 * (high - low):.1f} points (95 %)"
    verdict = "q8_0 is better" if high < 0 else "no difference shown"
    assert lines == [f"own_choices, 0-shot, acc: {verdict}; {half}"]

    without = run("eval", outcomes[0].artifact.ref if outcomes[0].artifact else "", "--no-tasks", "--json")
    (item,) = json.loads(without.stdout)
    assert (item["recorded"], "tasks" in item["evaluation"]) == (False, False)

    again = build(load_recipe(path, option_models()), workspace)
    assert {item.state for item in again} == {OutcomeState.UP_TO_DATE}
    write_rows(folder, known[::-1])
    reporter = ListReporter()
    build(load_recipe(path, option_models()), Workspace(workspace.store, workspace.cache, reporter), only=("q8_0",))
    texts = [event.text for event in reporter.events]
    assert "asking the artifact the task own_choices" in texts, "other data are measured anew"
    assert not any("quantizing" in text for text in texts), "and nothing is built for it"


def data_of(done: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(("task", "words"), [("mmlu", "mmlu is a group of tasks"), ("arc_eazy", "has no task")])
def test_a_name_that_is_no_task_ends_a_plan(tiny: Path, folder: Path, run: Run, task: str, words: str) -> None:
    path = recipe(folder, tiny, [{"task": task, "revision": COMMIT}])
    done = run("plan", path)
    assert done.exit_code == 2
    assert words in done.stderr


def test_a_wrong_task_ends_a_build_before_it_begins(tiny: Path, folder: Path, run: Run) -> None:
    write_task(folder, {**CHOICES, "doc_to_text": "{{nothing}}"}, "other")
    done = run("build", recipe(folder, tiny, [{"file": "other.yaml"}]))
    assert done.exit_code == 2
    assert "other.yaml can't be made by lm-evaluation-harness" in done.stderr
    assert "Traceback" not in done.stderr
    assert run("list", "artifacts", "--json").stdout.strip() == "[]"


def test_a_streamed_model_rates_texts_and_gives_no_answers(
    tiny: Path, folder: Path, cache: Cache, tmp_path: Path
) -> None:
    from quantize.evaluate.engine import STREAMED_ON_CPU
    from quantize.evaluate.harness import run_task
    from quantize.evaluate.streamed import open_streamed
    from quantize.evaluate.task_model import RuntimeModel
    from quantize.evaluate.tasks import TaskRun, load

    source = ModelRef(tiny, "safetensors")
    entries = [TaskEntry(file="own_choices.yaml"), TaskEntry(file="own_answers.yaml")]
    both = load(pinned(folder, cache, *entries))
    run = TaskRun(SilentReporter(), both, tiny, CONTEXT, STREAMED_ON_CPU)
    assert list(run.skipped) == ["own_answers"]
    whole, expected = ours(source, tiny, both[0])
    with closing(open_streamed(source, tiny, STREAMED_ON_CPU, SilentReporter(), tmp_path)) as runtime:
        model = RuntimeModel(runtime, tiny, CONTEXT, SilentReporter(), "task")
        scores = run_task(both[0], model, ("streamed", ""))
        with pytest.raises(UsageError, match="answers no prompts"):
            run_task(both[1], model, ("streamed", ""))
    assert [item.scores for item in scores.metrics] == [item.scores for item in whole.metrics]
    assert [value for value, _ in said(both[0])] == pytest.approx([value for value, _ in expected], rel=1e-5)
