"""Measures a finished build against its source, holds it against the gates of its recipe, and puts it where it belongs.

In: a recipe, its pinned source, a complete artifact. Out: a Decision, what was measured beside the manifest, and the
artifact among the good builds or aside. Figures that are there already are decided on again in no time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantize.calibration.text import PYTHON_DOCS, topics_file
from quantize.errors import BuildError, DiskFullError, GateError, QuantizeError, RefusedError, UsageError, VerifyError
from quantize.evaluate.gates import SERVING_LIMITS, Decision, Figures, Limits, decide
from quantize.evaluate.page import render_page
from quantize.evaluate.record import NAME, decided, failed_record, figures_of, read_record, to_record
from quantize.evaluate.session import CalibratedOn, Job, evaluate, figures, prepare_source
from quantize.evaluate.structure import Intended
from quantize.events import Event, Reporter, note, status, warn
from quantize.formats.base import Limits as RunLimits
from quantize.model.checkpoint import Checkpoint
from quantize.model.source import PinnedSource, dequantized_key
from quantize.provenance.card import render_card
from quantize.recipe.model import Recipe
from quantize.runtimes.base import FORMATS, ModelRef
from quantize.store.artifact import ASIDE, REFUSED, Artifact, commit, set_aside, write_measurements
from quantize.store.manifest import CARD_NAME, EVALUATION_NAME, RECIPE_NAME, AcceptedRisk, Manifest, canonical_hash
from quantize.store.staging import store_errors
from quantize.system.cache import Cache
from quantize.system.files import write_text
from quantize.system.lookup import GOLDEN, Found, builtin_files, find_data
from quantize.system.machine import describe_machine
from quantize.system.process import run_step

PROTOCOL_VERSION = 1  # of what is asked and how it is graded; another one measures anew
RUNS = "loads and runs"
NOT_RUNNING = "no gate can be loosened for that: build it again with --force, or leave this variant out"
UNQUANTIZED_SIZE_RATIO = 1.1  # a 16-bit conversion saves nothing: its file holds the same weights and a header
LOOKED = "paths are looked for beside the recipe, in the folder above it, and in the working folder"


@dataclass(frozen=True)
class _Named:
    """Gives events without a subject that of a variant."""

    reporter: Reporter
    subject: str

    def emit(self, event: Event) -> None:
        self.reporter.emit(event if event.subject else replace(event, subject=self.subject))


@dataclass(frozen=True)
class Judgement:
    """A decision, and the record of it that belongs into measurements.json."""

    decision: Decision
    record: dict[str, Any]


class Judge:
    """Measures and judges the artifacts of one recipe and source."""

    def __init__(self, recipe: Recipe, source: PinnedSource, cache: Cache, run: RunLimits) -> None:
        self.recipe = recipe
        self._source, self._cache, self._run = source, cache, run
        self._text, self._text_hash = _text(recipe, cache)
        found = _golden(recipe)
        self.golden = tuple(item.path.absolute() for item in found)
        self._notes = [item.note for item in found if item.note]
        self._golden_hashes = [cache.sha256(file) for path in self.golden for file in _files(path)]

    @staticmethod
    def can_measure(format: str) -> bool:
        """Whether a runtime is known for a format; plugins may bring formats of which none is."""
        return format in FORMATS

    def known(self, artifact: Artifact) -> Judgement | None:
        """Judged by figures that were measured by the present protocol; None if they must be measured."""
        record = read_record(artifact.measurements())
        if record is None or record.get("key") != self._key(artifact.manifest):
            return None
        return self._decided(record, figures_of(record), artifact.manifest)

    def prepare(self, checkpoint: Checkpoint, reporter: Reporter, *, calibrated: bool) -> None:
        """Read the text and the prompts with the source, once for all variants: what can't work fails before any build.

        calibrated: some variant is. Raises UsageError, RecipeError: text or golden prompts. RefusedError: text that is
        calibrated on. BuildError: the source can't be run here.
        """
        job = self._job(checkpoint, ModelRef(checkpoint.folder, "safetensors"))
        if calibrated and self.recipe.calibration is not None:
            job = replace(job, calibrated_on=CalibratedOn(self.recipe.calibration, self.recipe.path.parent))
        for text in self._notes:
            note(reporter, "", text)
        try:
            run_step("reading the held-out text with the source", reporter, prepare_source, job)
        except QuantizeError as exc:
            if isinstance(exc, (UsageError, DiskFullError)) or type(exc) is RefusedError:
                raise
            hint = "free memory, or build with --no-eval, which leaves the artifacts `not evaluated`"
            raise BuildError(f"the source can't be evaluated: {exc.message}", hint=hint) from exc

    def measure(self, artifact: Artifact, checkpoint: Checkpoint, reporter: Reporter) -> Judgement:
        """Run the artifact; the decision, and the record of it. An artifact that does not run is refused, not an error.

        Raises UsageError, RecipeError, BuildError, WorkerDied: nothing is known of the artifact then.
        """
        manifest, started = artifact.manifest, time.perf_counter()
        job = replace(
            self._job(checkpoint, _reference(artifact)),
            calibrated_on=self._calibrated_on(manifest),
            intended=Intended(manifest.bits, manifest.group_size, manifest.options),
        )
        try:
            found = run_step("evaluating", _Named(reporter, manifest.variant), evaluate, job)
        except VerifyError as exc:
            return self.failed(manifest, exc)
        weights = int(manifest.estimate["weights_bytes"])
        measured = figures(found, size_bytes=weights, source_bytes=manifest.source.weights_bytes)
        measured = replace(measured, checks={RUNS: "", **measured.checks})
        return self._decided(to_record(found, measured, self._about(manifest, started)), measured, manifest)

    def failed(self, manifest: Manifest, error: VerifyError) -> Judgement:
        """The decision on an artifact that does not load, run or hold what its source holds."""
        measured = Figures(checks={RUNS: error.message})
        record = failed_record(measured, self._about(manifest, time.perf_counter()))
        return self._decided(record, measured, manifest)

    def _decided(self, record: Mapping[str, Any], measured: Figures, manifest: Manifest) -> Judgement:
        limits = self._limits(manifest)
        decision = decide(measured, limits)
        return Judgement(decision, decided(record, decision, limits))

    def _limits(self, manifest: Manifest) -> Limits:
        gates = self.recipe.gates.model_dump(exclude=set(SERVING_LIMITS)) if self.recipe.gates else {}
        limits = Limits().with_gates(gates)
        if manifest.bits is not None and manifest.bits >= 16 and gates.get("max_size_ratio") is None:
            return replace(limits, max_size_ratio=UNQUANTIZED_SIZE_RATIO)
        return limits

    def _key(self, manifest: Manifest) -> str:
        """Names the protocol: figures with the same key were measured on the same text and prompts, in the same way."""
        settings = self.recipe.evaluation.model_dump(mode="json", exclude={"text", "golden"})
        return canonical_hash(
            {
                "version": PROTOCOL_VERSION,
                "source": self._source_key(),
                "text": self._text_hash,
                "golden": self._golden_hashes,
                "calibration": manifest.calibration.hash if manifest.calibration else None,
                **settings,
            }
        )

    def _source_key(self) -> str:
        return dequantized_key(self._source) if self._source.is_gguf else self._source.digest

    def _job(self, checkpoint: Checkpoint, artifact: ModelRef) -> Job:
        spec = self.recipe.evaluation
        return Job(
            source=ModelRef(checkpoint.folder, "safetensors"), source_digest=self._source_key(), artifact=artifact,
            cache=self._cache.root, text=self._text, column=spec.column, window=spec.window,
            windows_limit=spec.windows, golden=self.golden, context=spec.context, threads=self._run.threads,
        )  # fmt: skip

    def _calibrated_on(self, manifest: Manifest) -> CalibratedOn | None:
        if manifest.calibration is None or self.recipe.calibration is None:
            return None
        return CalibratedOn(self.recipe.calibration, self.recipe.path.parent, manifest.calibration.hash)

    def _about(self, manifest: Manifest, started: float) -> dict[str, Any]:
        source = self._source
        return {
            "key": self._key(manifest),
            "evaluated_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - started, 1),
            "artifact": {"name": f"{manifest.name}/{manifest.variant}", "format": manifest.format},
            "source": {"name": source.name, "uri": source.uri, "revision": source.revision, "digest": source.digest},
            "machine": describe_machine(),
        }


@dataclass(frozen=True)
class Settled:
    """Where an artifact is now, and the error if its gates refuse it; judgement is None if it was not evaluated."""

    artifact: Artifact
    judgement: Judgement | None
    error: GateError | None = None


class Gates:
    """Holds the gates over artifacts of one store. evaluate: measure what is not known; else it passes unmeasured.

    accept_risk: why an artifact that is refused is taken all the same, unless it does not even run.
    """

    def __init__(
        self, judge: Judge, store: Path, reporter: Reporter, *, evaluate: bool, accept_risk: str | None = None
    ) -> None:
        self.judge, self._store, self._reporter = judge, store, reporter
        self._evaluate, self._accept_risk = evaluate, accept_risk

    def measures(self, format: str) -> bool:
        """Whether artifacts of a format are measured where their figures are not known."""
        return self._evaluate and self.judge.can_measure(format)

    def settled(self, artifact: Artifact) -> Settled | None:
        """An artifact that is where its known figures put it, so that nothing is left to do; None if something is."""
        is_aside, known = artifact.folder.parent.name in ASIDE, self.judge.known(artifact)
        if known is None:
            return None if is_aside or self.measures(artifact.manifest.format) else Settled(artifact, None)
        if self._takes(artifact, known.decision) == is_aside or artifact.measurements()[NAME] != known.record:
            return None
        return Settled(artifact, known, refusal(artifact, known.decision) if is_aside else None)

    def settle(
        self, artifact: Artifact, checkpoint: Checkpoint, *, failure: VerifyError | None = None, anew: bool = False
    ) -> Settled:
        """Judge a complete artifact and put it where it belongs. Only call under its variant's lock.

        failure: verification refuses it, so that there is nothing to measure. anew: measure what is known, too.
        Raises UsageError, RecipeError, BuildError, WorkerDied: it could not be measured, and stays where it is.
        """
        manifest, variant = artifact.manifest, artifact.manifest.variant
        judged = None if anew else self.judge.known(artifact)
        if failure is not None:
            judged = self.judge.failed(manifest, failure)
        elif judged is None and self.measures(manifest.format):
            status(self._reporter, variant, "evaluating")
            judged = self._measured(artifact, checkpoint)
        if judged is None:
            note(self._reporter, variant, "not evaluated: no gate is held")
            return Settled(commit(self._store, artifact.folder, manifest), None)
        self._write(artifact, judged.record)
        if not self._takes(artifact, judged.decision):
            aside = set_aside(self._store, artifact.folder, manifest, REFUSED)
            return Settled(aside, judged, refusal(aside, judged.decision, failure))
        if not judged.decision.accepted and manifest.accepted_risk is None:
            manifest = self._with_risk(artifact, judged.decision)
        for finding in judged.decision.flags:
            warn(self._reporter, variant, f"{finding.gate}: {finding.reason}")
        return Settled(commit(self._store, artifact.folder, manifest), judged)

    def _measured(self, artifact: Artifact, checkpoint: Checkpoint) -> Judgement:
        try:
            return self.judge.measure(artifact, checkpoint, self._reporter)
        except BuildError as exc:  # the process ran out of memory, or crashed
            exc.hint = f"the build is kept, and the same command only measures it; --no-eval leaves it so ({exc.hint})"
            raise

    def record(self, artifact: Artifact, checkpoint: Checkpoint) -> Settled:
        """Measure an artifact that is in no store: written beside its manifest, and left where it is."""
        judged = self.judge.measure(artifact, checkpoint, self._reporter)
        self._write(artifact, judged.record)
        return Settled(artifact, judged, None if judged.decision.accepted else refusal(artifact, judged.decision))

    def _takes(self, artifact: Artifact, decision: Decision) -> bool:
        """Whether an artifact is good enough: by its gates, or because its risk was accepted, which needs it to run."""
        if decision.accepted:
            return True
        runs = all(finding.gate != RUNS for finding in decision.refusals)
        return runs and (artifact.manifest.accepted_risk is not None or self._accept_risk is not None)

    def _with_risk(self, artifact: Artifact, decision: Decision) -> Manifest:
        """The manifest that says so, and a card of it. Another digest: whoever pulls it can't miss it."""
        gates = tuple(finding.gate for finding in decision.refusals)
        risk = AcceptedRisk(reason=str(self._accept_risk), gates=gates)
        manifest = artifact.manifest.model_copy(update={"accepted_risk": risk}).sealed()
        warn(self._reporter, manifest.variant, f"refused by {', '.join(gates)}, and taken all the same: {risk.reason}")
        with store_errors(self._store):
            write_text(artifact.folder / CARD_NAME, render_card(manifest))
        return manifest

    def _write(self, artifact: Artifact, record: Mapping[str, Any]) -> None:
        """Put a record beside the manifest: in measurements.json, and for people in evaluation.md."""
        page = render_page(record, f"{artifact.manifest.source.name} {artifact.manifest.variant}")
        with store_errors(self._store):
            write_measurements(artifact.folder, {**artifact.measurements(), NAME: dict(record)})
            write_text(artifact.folder / EVALUATION_NAME, page)
            write_text(artifact.folder / RECIPE_NAME, self.judge.recipe.text)  # whose gates were held


def refusal(artifact: Artifact, decision: Decision, failure: VerifyError | None = None) -> GateError:
    """The error that names every limit that an artifact breaks, with its numbers. failure: why it was not measured."""
    subject = f"{artifact.manifest.name}/{artifact.manifest.variant}"
    reasons = "; ".join(f"{finding.gate}: {finding.reason}" for finding in decision.refusals)
    hint = "use more bits or another method, or loosen `gates` in the recipe and say why"
    if any(finding.gate == RUNS for finding in decision.refusals):
        hint = failure.hint if failure is not None and failure.hint else NOT_RUNNING
    return GateError(f"{subject} is refused: {reasons}", hint=f"{hint}; kept in {artifact.folder}")


def _reference(artifact: Artifact) -> ModelRef:
    main = None
    if artifact.manifest.format == "gguf":
        from quantize.formats.gguf.build import main_file

        main = main_file(artifact.folder).name
    return ModelRef(artifact.folder, artifact.manifest.format, main)


def _text(recipe: Recipe, cache: Cache) -> tuple[str, str]:
    """The held-out text as an evaluation Job names it, and its hash."""
    text = recipe.evaluation.text
    if text == PYTHON_DOCS:
        return text, cache.sha256(topics_file())
    found = recipe.find(text)
    if found is None or not found.is_file():
        hint = f"{LOOKED}, or use python-docs"
        raise UsageError(f"{recipe.path}: `evaluation`: no such text: {text}", hint=hint)
    return str(found.absolute()), cache.sha256(found)


def _golden(recipe: Recipe) -> list[Found]:
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
