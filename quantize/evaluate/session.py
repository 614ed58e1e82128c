"""One evaluation: the source's side once, from the cache if it is there; then the artifact's; then both compared.

In: an EvaluationJob (two models, held-out text, golden prompts, settings). Out: Evaluation. Both public functions are
meant to run in a worker process (run_step): they load libraries that patch others, and hold a whole model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from quantize.errors import VerifyError
from quantize.evaluate.answers import compare_answers
from quantize.evaluate.baseline import KIND, LIKELIEST, Baseline, baseline_key, find, record, save
from quantize.evaluate.decision import RUNS
from quantize.evaluate.device import ModelRun, on_device
from quantize.evaluate.engine import engine_tools
from quantize.evaluate.golden import GoldenSet, load_golden
from quantize.evaluate.held_out import CalibratedOn, hold_against
from quantize.evaluate.metrics import check_same_vocabulary, measure
from quantize.evaluate.prompts import Asked, PromptTokenizer, ask
from quantize.evaluate.record import Evidence, Figures, GoldenRecord, Quality
from quantize.evaluate.structure import Intended, check_structure
from quantize.evaluate.text import DEFAULT_WINDOW, Windows, cut_windows, load_text
from quantize.events import Reporter, note, status, warn
from quantize.formats import open_runtime, runtime_kind
from quantize.model.checkpoint import read_json
from quantize.model.shape import ModelShape
from quantize.recipe.model import Engine
from quantize.runtimes.base import ModelRef, Runtime
from quantize.runtimes.devices import AUTO, ON_CPU, DevicePlace
from quantize.system.cache import Cache

ANSWERS_KIND = "golden-answers"
DEFAULT_CONTEXT = 2048
MAX_OTHER_TOKENS = 0.05
"""Share of the tokens in use that may be spelled otherwise: converters rename special and added ones."""


@dataclass(frozen=True)
class EvaluationJob:
    """What to evaluate, and on what.

    source_digest: names the source's content, for the cache. text: `python-docs` or a file relative to `base`.
    windows_limit: at most so many windows, 0 for all. golden: files or folders; none asks nothing. context: tokens of a
    golden prompt and its answer, 0 for the smaller of 2,048 and the model's own. calibrated_on: the text that the
    artifact has seen, which the held-out text must not share. intended: what its weights must be; None looks at none.
    device: auto, or the name of what to run on where a runtime has it and a model fits; else it is the CPU.
    engine: auto reads block by block what does not fit there either, streamed whatever can be, runtime nothing.
    """

    source: ModelRef
    source_digest: str
    artifact: ModelRef
    cache: Path
    text: str = "python-docs"
    base: Path = Path()
    column: str = "text"
    window: int = DEFAULT_WINDOW
    windows_limit: int = 0
    golden: tuple[Path, ...] = ()
    context: int = 0
    threads: int = 0
    device: str = AUTO
    engine: Engine = "auto"
    calibrated_on: CalibratedOn | None = None
    intended: Intended | None = None


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one artifact; golden is None where no prompts were given.

    checks: see Figures. held_out: how it is known that the text was not calibrated on.
    """

    quality: Quality
    golden: GoldenRecord | None
    checks: Mapping[str, str]
    held_out: str


@dataclass(frozen=True)
class _Material:
    """What both models are given."""

    tokenizer: PromptTokenizer
    windows: Windows
    golden: GoldenSet | None
    asked: Asked | None
    context: int
    held_out: str


def prepare_source(reporter: Reporter, job: EvaluationJob) -> None:
    """Put the source's side into the cache. Raises UsageError, RecipeError, RefusedError, VerifyError."""
    _source_side(reporter, job, _material(job))


def evaluate(reporter: Reporter, job: EvaluationJob) -> Evaluation:
    """Measure an artifact against its source.

    Raises UsageError (text, prompts), RecipeError (golden files), RefusedError (text that was calibrated on),
    VerifyError (an artifact does not run, or is one of another model), MissingExtraError.
    """
    material = _material(job)
    baseline, source_answers = _source_side(reporter, job, material)
    checks = check_structure(reporter, job.artifact, job.source.folder, job.intended) if job.intended else {}
    wanted = _wanted(job, job.artifact, material)

    def run(place: DevicePlace) -> tuple[Quality, list[str] | None]:
        first = runtime_kind(job.artifact.format).first_load if place != ON_CPU else ""
        status(reporter, "", f"loading the {job.artifact.format} artifact{f'; {first}' if first else ''}")
        with closing(_open(reporter, job, wanted, place)) as runtime:
            for text in runtime.warnings:
                warn(reporter, "", text)
            check_same_vocabulary(runtime.vocabulary, baseline.vocabulary, material.windows)
            _check_same_tokens(runtime, job.artifact, material)
            quality = measure(runtime, material.windows, baseline, reporter)
            asks = source_answers is not None and _can_answer(reporter, material, place, "artifact")
            return quality, _answers(reporter, runtime, material, "artifact") if asks else None

    quality, answers = on_device(reporter, wanted, run)
    if material.golden is None or material.asked is None or source_answers is None or answers is None:
        return Evaluation(quality, None, checks, material.held_out)
    prompts, context = material.asked.prompts, material.context
    golden = compare_answers(material.golden, prompts, source_answers, answers, context)
    return Evaluation(quality, golden, checks, material.held_out)


def evidence(found: Evaluation, *, size_bytes: int, source_bytes: int) -> Evidence:
    """What the decision rule looks at: what was measured runs. Figures of a load are added by whoever measured them."""
    figures = Figures(size_bytes=size_bytes, source_bytes=source_bytes, checks={RUNS: "", **found.checks})
    return Evidence(quality=found.quality, golden=found.golden, figures=figures)


def _material(job: EvaluationJob) -> _Material:
    tokenizer = PromptTokenizer(_tokenizer_folder(job))
    text = load_text(job.text, job.base, column=job.column)
    windows = cut_windows(text, tokenizer.encode, prefix=tokenizer.prefix, window=job.window, limit=job.windows_limit)
    held_out = hold_against([windows], job.calibrated_on, _tokenizer_folder(job))
    if not job.golden:
        return _Material(tokenizer, windows, None, None, 0, held_out)
    golden = load_golden(job.golden)
    context = job.context or min(DEFAULT_CONTEXT, _max_context(job.source.folder))
    return _Material(tokenizer, windows, golden, ask(golden, tokenizer, context), context, held_out)


def _tokenizer_folder(job: EvaluationJob) -> Path:
    return job.source.folder if (job.source.folder / "tokenizer_config.json").is_file() else job.artifact.folder


def _max_context(folder: Path) -> int:
    path = folder / "config.json"
    if not path.is_file():
        return DEFAULT_CONTEXT
    return ModelShape.from_config(read_json(path)).max_context


def _wanted(job: EvaluationJob, model: ModelRef, material: _Material) -> ModelRun:
    return ModelRun(model, job.device, max(job.window, material.context), job.source.folder, job.engine)


_SourceSide = tuple[Baseline, tuple[str, ...] | None]  # None: a model that is streamed answers no prompts


def _source_side(reporter: Reporter, job: EvaluationJob, material: _Material) -> _SourceSide:
    """The source's baseline and golden answers; the source is only loaded for what is not in the cache."""
    wanted = _wanted(job, job.source, material)
    return on_device(reporter, wanted, lambda place: _source_side_on(reporter, job, material, wanted, place))


def _source_side_on(
    reporter: Reporter, job: EvaluationJob, material: _Material, wanted: ModelRun, place: DevicePlace
) -> _SourceSide:
    cache = Cache(job.cache)
    tools = engine_tools(job.source, place)
    key = baseline_key(job.source_digest, material.windows, tools, keep=LIKELIEST)
    answers_key = _answers_key(job, material, tools)
    baseline, answers = find(cache, key), _find_answers(cache, answers_key)
    asks = answers is None and _can_answer(reporter, material, place, "source")
    if baseline is not None and not asks:
        return baseline, answers
    status(reporter, "", "loading the source")
    with closing(_open(reporter, job, wanted, place)) as runtime:
        if baseline is None:
            baseline = made = record(runtime, material.windows, reporter)
            cache.make(KIND, key, lambda folder: save(made, folder))
        if asks:
            answers = texts = tuple(_answers(reporter, runtime, material, "source"))
            cache.make(ANSWERS_KIND, answers_key, lambda folder: _save_answers(texts, folder))
    return baseline, answers


def _open(reporter: Reporter, job: EvaluationJob, wanted: ModelRun, place: DevicePlace) -> Runtime:
    if place.streamed:
        from quantize.evaluate.streamed import open_streamed

        return open_streamed(wanted.model, job.source.folder, place, reporter, job.cache, threads=job.threads)
    return open_runtime(wanted.model, context=wanted.context, threads=job.threads, place=place)


def _can_answer(reporter: Reporter, material: _Material, place: DevicePlace, side: str) -> bool:
    """Whether a model can be asked what is to be asked: streamed, each token would read all its weights anew."""
    if not place.streamed or material.asked is None:
        return True
    note(reporter, "", f"golden prompts are not asked: the {side} is read block by block, and would take too long")
    return False


def _answers(reporter: Reporter, runtime: Runtime, material: _Material, side: str) -> list[str]:
    if material.asked is None:
        return []
    status(reporter, "", f"asking the {side} {len(material.asked.requests)} golden prompts")
    return [material.tokenizer.decode(ids) for ids in runtime.answer(material.asked.requests)]


def _answers_key(job: EvaluationJob, material: _Material, tools: dict[str, str]) -> str:
    asked = material.asked
    requests = [[item.token_ids, item.max_tokens, sorted(item.stop)] for item in asked.requests] if asked else []
    pinned = json.dumps([job.source_digest, requests, tools], sort_keys=True)
    return hashlib.sha256(pinned.encode()).hexdigest()


def _save_answers(answers: Sequence[str], folder: Path) -> None:
    (folder / "answers.json").write_text(json.dumps(list(answers), ensure_ascii=False), encoding="utf-8")


def _find_answers(cache: Cache, key: str) -> tuple[str, ...] | None:
    try:
        return tuple(json.loads((cache.entry(ANSWERS_KIND, key) / "answers.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        cache.remove(ANSWERS_KIND, key)
        return None


def _check_same_tokens(runtime: Runtime, artifact: ModelRef, material: _Material) -> None:
    """Raise VerifyError if the tokens of the text are other tokens in the artifact: figures would mean nothing."""
    used = sorted({token for ids in material.windows.token_ids for token in ids})
    expected = material.tokenizer.pieces(used)
    spell = getattr(runtime, "token_text", None)
    if spell is not None:
        found = [spell(token) for token in used]
    elif (artifact.folder / "tokenizer_config.json").is_file():
        found = PromptTokenizer(artifact.folder).pieces(used)
    else:
        return
    other = [index for index, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1]]
    if len(other) > MAX_OTHER_TOKENS * len(used):
        first = other[0]
        raise VerifyError(
            f"{artifact.path.name}: {len(other)} of {len(used)} tokens are not the source's "
            f"(token {used[first]} is {found[first]!r}, in the source {expected[first]!r})",
            hint="is this an artifact of another model?",
        )
