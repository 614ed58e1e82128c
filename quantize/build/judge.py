"""Measures a finished build against its source, and holds it against the gates of its recipe.

In: a recipe, its pinned source, a complete artifact. Out: the record of what was measured and decided. Figures that are
there already are decided on again, without measuring. Where the artifact belongs then is settle.py's.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantize.errors import (
    BuildError,
    DiskFullError,
    NotReadWholeError,
    QuantizeError,
    ReferenceNotFiniteError,
    RefusedError,
    UsageError,
    VerifyError,
)
from quantize.evaluate.decision import RUNS, GateThresholds
from quantize.evaluate.engine import why_not_streamed
from quantize.evaluate.gates import decide, thresholds
from quantize.evaluate.held_out import CalibratedOn
from quantize.evaluate.job import Evaluation, EvaluationJob, Reference, Ride
from quantize.evaluate.kinds import LOOKED, text_name, text_parts
from quantize.evaluate.record import (
    ArtifactName,
    EvaluationRecord,
    Evidence,
    Figures,
    MeasuredOn,
    SourceName,
    read_record,
)
from quantize.evaluate.structure import Intended
from quantize.evaluate.task_files import harness_version, pin_tasks
from quantize.events import Event, Reporter, note
from quantize.formats import find_format, known_format, recorded_options
from quantize.formats.base import Context
from quantize.formats.base import RunLimits as RunLimits
from quantize.formats.format import ReferenceMaker
from quantize.formats.safetensors.format import UNQUANTIZED
from quantize.model.checkpoint import Checkpoint
from quantize.model.source import PinnedSource, checkpoint_key
from quantize.recipe.model import Recipe
from quantize.runtimes.base import ModelRef
from quantize.store.artifact import Artifact
from quantize.store.manifest import Manifest
from quantize.system.cache import Cache
from quantize.system.digest import canonical_hash
from quantize.system.lookup import GOLDEN, NamedFile, builtin_files, find_data
from quantize.system.machine import describe_machine
from quantize.system.process import run_step

PROTOCOL_VERSION = 2  # of what is asked and how it is graded; another one measures anew
NOT_RUNNING = "no gate can be loosened for that: build it again with --force, or leave this variant out"


@dataclass(frozen=True)
class _Named:
    """Gives events without a subject that of a variant."""

    reporter: Reporter
    subject: str

    def emit(self, event: Event) -> None:
        self.reporter.emit(event if event.subject else replace(event, subject=self.subject))


class Judge:
    """Measures and judges the artifacts of one recipe and source."""

    def __init__(self, recipe: Recipe, source: PinnedSource, cache: Cache, run: RunLimits) -> None:
        self.recipe = recipe
        self._source, self._cache, self._run = source, cache, run
        spec = recipe.evaluation
        try:
            self._text = text_parts(spec.text, recipe.path.parent, spec.column)
        except UsageError as exc:
            raise UsageError(f"{recipe.path}: {exc.message}", hint=exc.hint) from exc
        self._text_name = text_name(spec.text, self._text)
        self._text_hashes = [[part.kind, part.is_questions, cache.sha256(part.file)] for part in self._text]
        found = _golden(recipe)
        self.golden = tuple(item.path.absolute() for item in found)
        self._notes = [item.note for item in found if item.note]
        self._golden_hashes = [cache.sha256(file) for path in self.golden for file in _files(path)]
        self._tasks = pin_tasks(spec.tasks, recipe.path, cache)

    @staticmethod
    def can_measure(format: str) -> bool:
        """Whether a runtime is known for a format."""
        return known_format(format).is_measurable

    def known(self, artifact: Artifact) -> EvaluationRecord | None:
        """Judged by figures that were measured by the present protocol; None if they must be measured."""
        record = read_record(artifact.measurements())
        if record is None or record.key != self._key(artifact.manifest):
            return None
        limits = self._limits(artifact.manifest)
        return record.decided(decide(record, limits), limits)

    def prepare(
        self, checkpoint: Checkpoint, reporter: Reporter, *, calibrated: bool, rides: bool = False
    ) -> Ride | None:
        """Read the text and the prompts with the source, once for all variants: what can't work fails before any build.

        calibrated: some variant is. rides: see prepare_source; what it leaves to the pass is to be prepared after it.
        Raises UsageError, RecipeError: text or golden prompts. RefusedError: text that is calibrated on. BuildError:
        the source can't be run here.
        """
        from quantize.evaluate.session import prepare_source

        job = self._job(checkpoint, ModelRef(checkpoint.folder, UNQUANTIZED))
        if calibrated and self.recipe.calibration is not None:
            job = replace(job, calibrated_on=CalibratedOn(self.recipe.calibration, self.recipe.path.parent))
        for text in self._notes:
            note(reporter, "", text)
        self._notes = []  # said once
        try:
            return run_step("reading the held-out text with the source", reporter, prepare_source, job, rides=rides)
        except QuantizeError as exc:
            if isinstance(exc, (UsageError, DiskFullError)) or type(exc) is RefusedError:
                raise
            hint = "free memory, say `evaluation: {engine: streamed}`, or build with --no-eval, which measures nothing"
            raise BuildError(f"the source can't be evaluated: {exc.message}", hint=hint) from exc

    def measure(self, artifact: Artifact, checkpoint: Checkpoint, reporter: Reporter) -> EvaluationRecord:
        """Run the artifact; what was measured and decided. An artifact that does not run is refused, not an error.

        Raises UsageError, RecipeError, BuildError, WorkerDied: nothing is known of the artifact then. VerifyError: its
        manifest has options that are not known here.
        """
        from quantize.evaluate.session import evidence

        manifest, started = artifact.manifest, time.perf_counter()
        job = replace(
            self._job(checkpoint, _reference(artifact)),
            calibrated_on=self._calibrated_on(manifest),
            intended=Intended(manifest.bits, manifest.group_size, manifest.options),
        )
        said = _Named(reporter, manifest.variant)
        maker = find_format(manifest.format).reference
        options = recorded_options(manifest.format, manifest.format_options) if maker is not None else None
        root = self._cache.root  # the reference goes into the cache, and nowhere else
        context = Context(manifest.variant, options, self._source, checkpoint, self._cache, root, root, self._run)
        try:
            found = _evaluate(job, maker, context, said)
        except VerifyError as exc:
            return self.failed(manifest, exc, time.perf_counter() - started)
        measured = evidence(found, size_bytes=manifest.weights_bytes, source_bytes=manifest.source.weights_bytes)
        return self._record(measured, manifest, time.perf_counter() - started, found.held_out)

    def failed(self, manifest: Manifest, error: VerifyError, seconds: float = 0) -> EvaluationRecord:
        """The decision on an artifact that does not load, run or hold what its source holds."""
        return self._record(Evidence(figures=Figures(checks={RUNS: error.message})), manifest, seconds)

    def _limits(self, manifest: Manifest) -> GateThresholds:
        return thresholds(self.recipe.gates, manifest.bits)

    def _key(self, manifest: Manifest) -> str:
        """Names the protocol: figures with the same key were measured on the same text and prompts, in the same way."""
        spec = self.recipe.evaluation
        return canonical_hash(
            {
                "version": PROTOCOL_VERSION,
                "source": self._source_key(),
                "text": self._text_hashes,
                "golden": self._golden_hashes,
                "calibration": manifest.calibration.hash if manifest.calibration else None,
                "column": spec.column,
                "context": spec.context,
                "engine": spec.engine,
                **asdict(spec.extent),
                **self._tasks_key(),
            }
        )

    def _tasks_key(self) -> dict[str, Any]:
        """Of the tasks; nothing where there are none, so that older records count."""
        tasks = [[task.identity, task.entry.metric] for task in self._tasks]
        return {"tasks": tasks, "harness": harness_version()} if tasks else {}

    def _source_key(self) -> str:
        return checkpoint_key(self._source)

    def _job(self, checkpoint: Checkpoint, artifact: ModelRef) -> EvaluationJob:
        spec = self.recipe.evaluation
        return EvaluationJob(
            source=ModelRef(checkpoint.folder, UNQUANTIZED), source_digest=self._source_key(), artifact=artifact,
            cache=self._cache.root, text=self._text, text_name=self._text_name, column=spec.column,
            extent=spec.extent, golden=self.golden, context=spec.context, threads=self._run.threads,
            device=self._run.device, engine=spec.engine, tasks=self._tasks,
        )  # fmt: skip

    def _calibrated_on(self, manifest: Manifest) -> CalibratedOn | None:
        if manifest.calibration is None or self.recipe.calibration is None:
            return None
        seen = manifest.calibration
        hashes = tuple(part.hash for part in seen.parts or ())
        return CalibratedOn(self.recipe.calibration, self.recipe.path.parent, seen.hash, hashes)

    def _record(
        self, measured: Evidence, manifest: Manifest, seconds: float, held_out: str | None = None
    ) -> EvaluationRecord:
        """What was measured, with what, and the decision on it."""
        limits, source = self._limits(manifest), self._source
        tasks: dict[str, Any] = {} if measured.tasks is None else {"tasks": measured.tasks}
        decision = decide(measured, limits)
        return EvaluationRecord(
            quality=measured.quality, conversion=measured.conversion, golden=measured.golden, figures=measured.figures,
            verdict=decision.verdict, findings=decision.findings, limits=limits, held_out=held_out,
            artifact=ArtifactName(name=f"{manifest.name}/{manifest.variant}", format=manifest.format),
            source=SourceName(name=source.name, uri=source.uri, revision=source.revision, digest=source.digest),
            machine=MeasuredOn.model_validate(describe_machine()), key=self._key(manifest),
            evaluated_at=datetime.now(UTC).isoformat(timespec="seconds"), seconds=round(seconds, 1), **tasks,
        )  # fmt: skip


def _evaluate(job: EvaluationJob, maker: ReferenceMaker | None, context: Context, reporter: Reporter) -> Evaluation:
    """Measure in a worker. maker: of the reference, which is only made if it has not been measured before.

    What its runtime does not read whole is read block by block, in another worker: the first one's libraries may have
    been changed on the way.
    """

    from quantize.evaluate.session import evaluate  # late: only what is not measured yet needs it

    def measured(reference: Reference | None) -> Evaluation | None:
        asked = replace(job, reference=reference)
        try:
            return run_step("evaluating", reporter, evaluate, asked)
        except NotReadWholeError as exc:
            if why_not_streamed(job.artifact, job.source.folder):
                raise
            note(reporter, "", f"it is read block by block: {exc.message}")
            return run_step("evaluating", reporter, evaluate, replace(asked, artifact_engine="streamed"))

    def against(maker: ReferenceMaker, context: Context) -> Evaluation | None:
        digest, ready = maker.intermediate(context)
        found = measured(Reference(digest, None)) if ready is None else None
        if found is None:
            with maker.converted(context, reporter) as path:
                found = measured(Reference(digest, ModelRef(path.parent, job.artifact.format, path.name)))
        return found

    if maker is None:
        found = measured(None)
    else:
        try:
            found = against(maker, context)
        except ReferenceNotFiniteError as exc:
            note(reporter, "", f"{exc.message}: it is measured once more in a type with more range")
            found = against(maker, replace(context, checkpoint=replace(context.checkpoint, wide=True)))
    assert found is not None
    return found


def _reference(artifact: Artifact) -> ModelRef:
    name, folder = artifact.manifest.format, artifact.folder
    main = find_format(name).layout.main_file(folder)
    return ModelRef(folder, name, main.name if main is not None else None)


def _golden(recipe: Recipe) -> list[NamedFile]:
    """The recipe's golden prompts; where it names none, those of a folder of the user's, or of the package."""
    named = recipe.evaluation.golden
    paths = []
    for item in [GOLDEN] if named is None else named:
        found = find_data(item, recipe.path.parent, GOLDEN)
        if found is None:
            hint = f"{LOOKED}; by name there are: {', '.join(builtin_files(GOLDEN))}"
            raise UsageError(f"{recipe.path}: `evaluation`: no such golden prompts: {item}", hint=hint)
        paths.append(found)
    return paths


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.yaml")) if path.is_dir() else [path]
