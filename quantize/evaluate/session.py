"""One evaluation: the source's side once, from the cache if it is there; then the artifact's; then both compared.

In: an EvaluationJob (two models, held-out text, golden prompts, settings). Out: Evaluation. Both public functions are
meant to run in a worker process (run_step): they load libraries that patch others, and hold a whole model.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

from quantize.evaluate.answers import compare_answers
from quantize.evaluate.decision import RUNS
from quantize.evaluate.device import on_device
from quantize.evaluate.job import Evaluation, EvaluationJob, Ride
from quantize.evaluate.material import Material, read_material
from quantize.evaluate.measure import measure, other_vocabulary
from quantize.evaluate.prompts import PromptTokenizer
from quantize.evaluate.record import Evidence, Figures, GoldenRecord
from quantize.evaluate.source_side import (
    SourceSide,
    can_answer,
    open_model,
    reference_side,
    source_ride,
    source_side,
    task_run,
    wanted_run,
)
from quantize.evaluate.structure import check_structure
from quantize.events import Reporter, status, warn
from quantize.formats import runtime_kind
from quantize.runtimes.base import ModelRef, Runtime
from quantize.runtimes.devices import ON_CPU, DevicePlace

TOKENS = "the source's tokens"
"""The check that the text is the same text to both models."""
MAX_OTHER_TOKENS = 0.05
"""Share of the tokens in use that may be spelled otherwise: converters rename special and added ones."""


def prepare_source(reporter: Reporter, job: EvaluationJob, *, rides: bool = False) -> Ride | None:
    """Put the source's side into the cache. rides: a calibration pass comes, and what it can do beside is left to it.

    Raises UsageError, RecipeError, RefusedError, VerifyError.
    """
    material = read_material(job)
    ride = source_ride(reporter, job, material) if rides else None
    if ride is None:
        source_side(reporter, job, material)
    return ride


def evaluate(reporter: Reporter, job: EvaluationJob) -> Evaluation | None:
    """Measure an artifact against its source. None: the job's reference is to be made first.

    Raises UsageError (text, prompts), RecipeError (golden files), RefusedError (text that was calibrated on),
    VerifyError (an artifact does not run; NotReadWholeError: its runtime reads no such model), MissingExtraError.
    """
    material = read_material(job)
    source = source_side(reporter, job, material)
    reference = reference_side(reporter, job, material, source)
    if reference is None:
        return None
    checks = check_structure(reporter, job.artifact, job.source.folder, job.intended) if job.intended else {}
    wanted = wanted_run(job, job.artifact, material)
    if job.artifact_engine is not None:
        wanted = replace(wanted, engine=job.artifact_engine)

    def run(place: DevicePlace) -> Evaluation:
        first = runtime_kind(job.artifact.format).first_load if place != ON_CPU else ""
        status(reporter, "", f"loading the {job.artifact.format} artifact{f'; {first}' if first else ''}")
        with closing(open_model(reporter, job, wanted, place)) as runtime:
            for text in runtime.warnings:
                warn(reporter, "", text)
            checked = {**checks, TOKENS: other_tokens(runtime, job.artifact, material, source)}
            if checked[TOKENS]:
                return Evaluation(None, None, checked, material.held_out, reference.conversion)
            quality = measure(runtime, source.windows, reference.baseline, reporter)
            golden = _golden(reporter, runtime, material, source, place)
            asked = task_run(reporter, job, material, place)
            tasks = asked.measure(runtime, source.tasks) if material.tasks else None
        devices = {"runtime_device": place.device, "source_device": reference.device}
        measured = quality.model_copy(update=devices)
        return Evaluation(measured, golden, checked, material.held_out, reference.conversion, tasks)

    return on_device(reporter, wanted, run)


def _golden(
    reporter: Reporter, runtime: Runtime, material: Material, source: SourceSide, place: DevicePlace
) -> GoldenRecord | None:
    """The answers of both; None where no prompts are asked, or one of the two can't be."""
    if material.golden is None or material.asked is None or source.golden is None:
        return None
    if not can_answer(reporter, material, place, "artifact"):
        return None
    asked = material.asked
    status(reporter, "", f"asking the artifact {len(asked.requests)} golden prompts")
    answers = [material.tokenizer.decode(ids) for ids in runtime.answer(asked.requests)]
    return compare_answers(material.golden, asked.prompts, source.golden, answers, material.context)


def evidence(found: Evaluation, *, size_bytes: int, source_bytes: int) -> Evidence:
    """What the decision rule looks at: what was measured runs. Figures of a load are added by whoever measured them."""
    figures = Figures(size_bytes=size_bytes, source_bytes=source_bytes, checks={RUNS: "", **found.checks})
    tasks: dict[str, Any] = {} if found.tasks is None else {"tasks": found.tasks}
    return Evidence(quality=found.quality, conversion=found.conversion, golden=found.golden, figures=figures, **tasks)


def other_tokens(runtime: Runtime, artifact: ModelRef, material: Material, source: SourceSide) -> str:
    """What is wrong if the tokens of the text are others in the artifact: figures would mean nothing. "" if not."""
    problem = other_vocabulary(runtime.vocabulary, source.baseline.vocabulary, source.windows)
    if problem:
        return problem
    used = sorted({token for ids in source.windows.token_ids for token in ids})
    expected = material.tokenizer.pieces(used)
    spell = getattr(runtime, "token_text", None)
    if spell is not None:
        found = [spell(token) if token < runtime.vocabulary else None for token in used]
    elif (artifact.folder / "tokenizer_config.json").is_file():
        found = PromptTokenizer(artifact.folder).pieces(used)
    else:
        return ""
    other = [index for index, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1]]
    if len(other) <= MAX_OTHER_TOKENS * len(used):
        return ""
    first = other[0]
    return (
        f"{len(other)} of {len(used)} tokens of the text are others in the artifact (token {used[first]} is "
        f"{found[first]!r}, in the source {expected[first]!r}): is this an artifact of another model?"
    )
