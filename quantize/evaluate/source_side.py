"""The source's side of an evaluation, from the cache where it is there: its answers, its Baseline; and the same source
in the runtime of an artifact, which is what artifacts of that format are compared with.

In: an EvaluationJob, Material. Out: SourceSide, ReferenceSide. A model is only loaded for what is not in the cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from quantize.errors import BuildError, NotFiniteError, ReferenceNotFiniteError, VerifyError
from quantize.evaluate.baseline import KIND, LIKELIEST, Baseline, baseline_key, find, record, save
from quantize.evaluate.device import ModelRun, find_place, on_device
from quantize.evaluate.engine import engine_tools
from quantize.evaluate.job import EvaluationJob, Reference, Ride
from quantize.evaluate.material import Material, tokenizer_folder
from quantize.evaluate.measure import convert_and_record
from quantize.evaluate.record import Conversion
from quantize.evaluate.task_record import TaskScores
from quantize.evaluate.tasks import TaskRun
from quantize.evaluate.text import Windows
from quantize.events import Reporter, SilentReporter, note, status
from quantize.formats import open_runtime
from quantize.runtimes.base import ModelRef, Runtime
from quantize.runtimes.devices import DevicePlace
from quantize.system.cache import Cache

ANSWERS_KIND, CONVERSIONS_KIND = "source-answers", "conversions"
RIDDEN_KIND = "source-states"  # by the key of the Baseline that is made of them
FILE = "found.json"
Answers = Sequence[Sequence[int]]
Found = TypeVar("Found")


@dataclass(frozen=True)
class SourceSide:
    """What the source says. windows: all text, its own answers too. golden: its answers to the golden prompts;
    None where it is not asked. device: what it was measured on. tasks: its scores, by the tasks' identities.
    """

    windows: Windows
    baseline: Baseline
    golden: tuple[str, ...] | None
    device: str
    tasks: Mapping[str, TaskScores]


@dataclass(frozen=True)
class ReferenceSide:
    """What an artifact is compared with. conversion: None where that is the source in transformers."""

    baseline: Baseline
    conversion: Conversion | None
    device: str


def source_side(reporter: Reporter, job: EvaluationJob, material: Material) -> SourceSide:
    """Answers and Baseline of the source. Raises VerifyError: it does not run. MissingExtraError."""
    wanted = wanted_run(job, job.source, material)
    return on_device(reporter, wanted, lambda place: _source_on(reporter, job, material, wanted, place))


def source_ride(reporter: Reporter, job: EvaluationJob, material: Material) -> Ride | None:
    """What of the source's side is left to a calibration pass: where the source is streamed and has no Baseline."""
    place, cache = find_place(SilentReporter(), wanted_run(job, job.source, material)), Cache(job.cache)
    if not place.streamed:
        return None
    tools = engine_tools(job.source, place)
    windows = material.windows(_find(cache, ANSWERS_KIND, _answers_key(job, material, tools), _read_answers))
    key = baseline_key(job.source_digest, windows, tools, keep=LIKELIEST)
    done = find(cache, key) is not None or cache.entry(RIDDEN_KIND, key).is_dir()
    if done or task_run(reporter, job, material, place).find(cache, job.source_digest, tools) is None:
        return None
    note(reporter, "", "the held-out text goes through the source's blocks beside the calibration text")
    return Ride(windows.token_ids, key, job.cache)


def reference_side(
    reporter: Reporter, job: EvaluationJob, material: Material, source: SourceSide
) -> ReferenceSide | None:
    """The Baseline for an artifact: the source's own, or that of the job's reference. None: that is to be made first.

    Raises BuildError: it does not run, which says nothing of the artifact; ReferenceNotFiniteError where its type has
    too little range.
    """
    reference = job.reference
    if reference is None:
        return ReferenceSide(source.baseline, None, source.device)
    wanted = wanted_run(job, reference.model or job.artifact, material)  # of either format, and nearly as large
    try:
        return on_device(reporter, wanted, lambda place: _reference_on(reporter, job, reference, source, wanted, place))
    except VerifyError as exc:
        message = f"the source can't be measured as a {wanted.model.format} model: {exc.message}"
        kind = ReferenceNotFiniteError if isinstance(exc, NotFiniteError) else BuildError
        raise kind(message, hint=exc.hint) from exc


def wanted_run(job: EvaluationJob, model: ModelRef, material: Material) -> ModelRun:
    """A model of an evaluation, as it is to be run."""
    return ModelRun(model, job.device, material.longest, job.source.folder, job.engine)


def open_model(
    reporter: Reporter, job: EvaluationJob, wanted: ModelRun, place: DevicePlace, ridden: Path | None = None
) -> Runtime:
    """Load a model of an evaluation. ridden: see open_streamed. Raises VerifyError, MissingExtraError."""
    if place.streamed:
        from quantize.evaluate.streamed import open_streamed

        source = job.source.folder
        return open_streamed(wanted.model, source, place, reporter, job.cache, threads=job.threads, ridden=ridden)
    return open_runtime(wanted.model, context=wanted.context, threads=job.threads, place=place)


def can_answer(reporter: Reporter, material: Material, place: DevicePlace, side: str) -> bool:
    """Whether a model can be asked what is to be asked: streamed, each token would read all its weights anew."""
    if not place.streamed or not material.requests:
        return True
    note(reporter, "", f"nothing is asked: the {side} is read block by block, and answers would take too long")
    return False


def task_run(reporter: Reporter, job: EvaluationJob, material: Material, place: DevicePlace) -> TaskRun:
    """The tasks of an evaluation at a place."""
    return TaskRun(reporter, material.tasks, tokenizer_folder(job), material.task_context, place)


def _source_on(
    reporter: Reporter, job: EvaluationJob, material: Material, wanted: ModelRun, place: DevicePlace
) -> SourceSide:
    cache, tools = Cache(job.cache), engine_tools(job.source, place)
    answers_key = _answers_key(job, material, tools)
    answers = _find(cache, ANSWERS_KIND, answers_key, _read_answers)
    asks = answers is None and can_answer(reporter, material, place, "source")
    run = task_run(reporter, job, material, place)
    tasks, ridden = run.find(cache, job.source_digest, tools), None
    if not asks:
        windows = material.windows(answers)
        key = baseline_key(job.source_digest, windows, tools, keep=LIKELIEST)
        baseline, left = find(cache, key), cache.entry(RIDDEN_KIND, key)
        if baseline is not None and tasks is not None:
            return _side(material, windows, baseline, answers, place, tasks)
        ridden = left if left.is_dir() else None
    status(reporter, "", "loading the source")
    with closing(open_model(reporter, job, wanted, place, ridden)) as runtime:
        if asks:
            answers = texts = _ask(reporter, runtime, material)
            cache.make(ANSWERS_KIND, answers_key, lambda folder: _write(folder, json.dumps(texts)))
        windows = material.windows(answers)
        key = baseline_key(job.source_digest, windows, tools, keep=LIKELIEST)
        baseline = find(cache, key)
        if baseline is None:
            baseline = made = record(runtime, windows, reporter)
            cache.make(KIND, key, lambda folder: save(made, folder))
        cache.remove(RIDDEN_KIND, key)
        tasks = run.measure_source(runtime, cache, job.source_digest, tools)
    return _side(material, windows, baseline, answers, place, tasks)


def _side(
    material: Material, windows: Windows, baseline: Baseline, answers: Answers | None, place: DevicePlace,
    tasks: Mapping[str, TaskScores],
) -> SourceSide:  # fmt: skip
    golden = None if answers is None else tuple(map(material.tokenizer.decode, answers[material.questions :]))
    return SourceSide(windows, baseline, golden, place.device, tasks)


def _ask(reporter: Reporter, runtime: Runtime, material: Material) -> list[list[int]]:
    if not material.requests:
        return []
    asked = [f"{material.questions} questions"] if material.questions else []
    asked += [f"{len(material.asked.requests)} golden prompts"] if material.asked is not None else []
    status(reporter, "", f"asking the source {' and '.join(asked)}")
    return runtime.answer(material.requests)


def _reference_on(
    reporter: Reporter, job: EvaluationJob, reference: Reference, source: SourceSide, wanted: ModelRun,
    place: DevicePlace,
) -> ReferenceSide | None:  # fmt: skip
    cache, windows = Cache(job.cache), source.windows
    key = baseline_key(reference.digest, windows, engine_tools(wanted.model, place), keep=LIKELIEST)
    compared = f"{key} {source.baseline.runtime} {source.baseline.version} {source.device}"
    conversion_key = hashlib.sha256(compared.encode()).hexdigest()
    baseline = find(cache, key)
    conversion = _find(cache, CONVERSIONS_KIND, conversion_key, Conversion.model_validate_json)
    if baseline is None or conversion is None:
        if reference.model is None:
            return None
        status(reporter, "", f"loading the source as a {reference.model.format} model")
        with closing(open_model(reporter, job, wanted, place)) as runtime:
            baseline, conversion = made = convert_and_record(runtime, windows, source.baseline, reporter)
        cache.make(KIND, key, lambda folder: save(made[0], folder))
        cache.make(CONVERSIONS_KIND, conversion_key, lambda folder: _write(folder, made[1].model_dump_json()))
    return ReferenceSide(baseline, conversion, place.device)


def _answers_key(job: EvaluationJob, material: Material, tools: dict[str, str]) -> str:
    requests = [[item.token_ids, item.max_tokens, sorted(item.stop)] for item in material.requests]
    return hashlib.sha256(json.dumps([job.source_digest, requests, tools], sort_keys=True).encode()).hexdigest()


def _write(folder: Path, text: str) -> None:
    (folder / FILE).write_text(text, encoding="utf-8")


def _find(cache: Cache, kind: str, key: str, read: Callable[[str], Found]) -> Found | None:
    """What `_write` put into an entry of the cache; None, and the entry dropped, if it is not there or damaged."""
    try:
        return read((cache.entry(kind, key) / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        cache.remove(kind, key)
        return None


def _read_answers(text: str) -> list[list[int]]:
    return [[int(token) for token in ids] for ids in json.loads(text)]
