"""Holds the gates over complete artifacts, and puts each where it belongs: built, or aside as refused.

In: an artifact and its Judge. Out: where it is now, with its record and its error. Measuring is left to judge.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from quantize.build.job import VariantJob
from quantize.build.judge import NOT_RUNNING, Judge
from quantize.errors import BuildError, GateError, VerifyError
from quantize.evaluate.decision import RUNS, STRUCTURE, Decision
from quantize.evaluate.job import Ride
from quantize.evaluate.page import render_page
from quantize.evaluate.record import NAME, EvaluationRecord, read_record
from quantize.events import note, status, warn
from quantize.model.checkpoint import Checkpoint
from quantize.store.artifact import ASIDE, REFUSED, Artifact, commit, set_aside, write_measurements
from quantize.store.manifest import CARD_NAME, EVALUATION_NAME, RECIPE_NAME, AcceptedRisk, Manifest
from quantize.store.staging import store_errors
from quantize.store.workspace import Workspace
from quantize.system.files import write_text


@dataclass(frozen=True)
class Settled:
    """Where an artifact is now, and the error if its gates refuse it; record is None if it was not evaluated."""

    artifact: Artifact
    record: EvaluationRecord | None
    error: GateError | None = None


class Gates(Protocol):
    """Who says what becomes of complete artifacts."""

    def settled(self, artifact: Artifact) -> Settled | None:
        """An artifact that is where it belongs, so that nothing is left to do; None if something is."""

    def prepare(self, jobs: Sequence[VariantJob], checkpoint: Checkpoint, *, rides: bool = False) -> Ride | None:
        """What measuring these jobs needs of the source, before anything is built. rides: see Judge.prepare."""

    def settle(
        self, artifact: Artifact, checkpoint: Checkpoint, *, failure: VerifyError | None = None, anew: bool = False
    ) -> Settled:
        """Put a complete artifact where it belongs. Only call under its variant's lock."""


class NoGates:
    """Takes every complete artifact as it is: for whoever compares it with one that passed its gates."""

    def __init__(self, workspace: Workspace) -> None:
        self._store = workspace.store.root

    def settled(self, artifact: Artifact) -> Settled | None:
        """None is ever left to do."""
        return Settled(artifact, None)

    def prepare(self, jobs: Sequence[VariantJob], checkpoint: Checkpoint, *, rides: bool = False) -> Ride | None:
        """Nothing is measured."""

    def settle(
        self, artifact: Artifact, checkpoint: Checkpoint, *, failure: VerifyError | None = None, anew: bool = False
    ) -> Settled:
        """Put it in its place."""
        return Settled(commit(self._store, artifact.folder, artifact.manifest), None)


class GateKeeper:
    """Holds the gates over artifacts of one store. evaluate: measure what is not known; else it passes unmeasured.

    accept_risk: why an artifact that is refused is taken all the same, unless it does not even run.
    """

    def __init__(self, judge: Judge, workspace: Workspace, *, evaluate: bool, accept_risk: str | None = None) -> None:
        self.judge, self._store, self._reporter = judge, workspace.store.root, workspace.reporter
        self._evaluate, self._accept_risk = evaluate, accept_risk

    def measures(self, format: str) -> bool:
        """Whether artifacts of a format are measured where their figures are not known."""
        return self._evaluate and self.judge.can_measure(format)

    def prepare(self, jobs: Sequence[VariantJob], checkpoint: Checkpoint, *, rides: bool = False) -> Ride | None:
        """The source's side of measuring those whose figures are not known. Raises as Judge.prepare does."""
        measured = [job for job in jobs if self.measures(job.variant.format) and not self._is_known(job.existing)]
        if not measured:
            return None
        calibrated = any(job.is_calibrated for job in measured)
        return self.judge.prepare(checkpoint, self._reporter, calibrated=calibrated, rides=rides)

    def _is_known(self, artifact: Artifact | None) -> bool:
        return artifact is not None and self.judge.known(artifact) is not None

    def settled(self, artifact: Artifact) -> Settled | None:
        """An artifact that is where its known figures put it, so that nothing is left to do; None if something is."""
        is_aside, known = artifact.folder.parent.name in ASIDE, self.judge.known(artifact)
        if known is None:
            return None if is_aside or self.measures(artifact.manifest.format) else Settled(artifact, None)
        recorded = read_record(artifact.measurements())  # by another version maybe, which kept fewer figures
        if self._takes(artifact, known.decision) == is_aside or recorded is None or not recorded.is_same(known):
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
        self._write(artifact, judged)
        if not self._takes(artifact, judged.decision):
            aside = set_aside(self._store, artifact.folder, manifest, REFUSED)
            return Settled(aside, judged, refusal(aside, judged.decision, failure))
        if not judged.decision.accepted and manifest.accepted_risk is None:
            manifest = self._with_risk(artifact, judged.decision)
        for finding in judged.decision.flags:
            warn(self._reporter, variant, f"{finding.gate}: {finding.reason}")
        return Settled(commit(self._store, artifact.folder, manifest), judged)

    def _measured(self, artifact: Artifact, checkpoint: Checkpoint) -> EvaluationRecord:
        try:
            return self.judge.measure(artifact, checkpoint, self._reporter)
        except BuildError as exc:  # the process ran out of memory, or crashed
            exc.hint = f"the build is kept, and the same command only measures it; --no-eval leaves it so ({exc.hint})"
            raise

    def record(self, artifact: Artifact, checkpoint: Checkpoint) -> Settled:
        """Measure an artifact that is in no store: written beside its manifest, and left where it is."""
        judged = self.judge.measure(artifact, checkpoint, self._reporter)
        self._write(artifact, judged)
        return Settled(artifact, judged, None if judged.decision.accepted else refusal(artifact, judged.decision))

    def _takes(self, artifact: Artifact, decision: Decision) -> bool:
        """Whether an artifact is good enough: by its gates, or because its risk was accepted, which needs it to run."""
        if decision.accepted:
            return True
        runs = all(finding.gate != RUNS for finding in decision.refusals)
        return runs and (artifact.manifest.accepted_risk is not None or self._accept_risk is not None)

    def _with_risk(self, artifact: Artifact, decision: Decision) -> Manifest:
        """The manifest that says so, and a card of it. Another digest: whoever pulls it can't miss it."""
        from quantize.provenance.card import render_card  # late: it can draw

        gates = tuple(finding.gate for finding in decision.refusals)
        risk = AcceptedRisk(reason=str(self._accept_risk), gates=gates)
        manifest = artifact.manifest.with_risk(risk)
        warn(self._reporter, manifest.variant, f"refused by {', '.join(gates)}, and taken all the same: {risk.reason}")
        with store_errors(self._store):
            write_text(artifact.folder / CARD_NAME, render_card(manifest))
        return manifest

    def _write(self, artifact: Artifact, record: EvaluationRecord) -> None:
        """Put a record beside the manifest: in measurements.json, and for people in evaluation.md."""
        page = render_page(record, f"{artifact.manifest.source.name} {artifact.manifest.variant}")
        with store_errors(self._store):
            write_measurements(artifact.folder, {**artifact.measurements(), NAME: record.to_data()})
            write_text(artifact.folder / EVALUATION_NAME, page)
            write_text(artifact.folder / RECIPE_NAME, self.judge.recipe.text)  # whose gates were held


NO_LIMIT = "no limit in `gates` stands for that: take another method, or say with --accept-risk why it is taken"


def refusal(artifact: Artifact, decision: Decision, failure: VerifyError | None = None) -> GateError:
    """The error that names every limit that an artifact breaks, with its numbers. failure: why it was not measured."""
    subject = f"{artifact.manifest.name}/{artifact.manifest.variant}"
    reasons = "; ".join(f"{finding.gate}: {finding.reason}" for finding in decision.refusals)
    hint = "use more bits or another method, or loosen `gates` in the recipe and say why"
    if all(finding.gate in STRUCTURE for finding in decision.refusals):
        hint = NO_LIMIT
    if any(finding.gate == RUNS for finding in decision.refusals):
        hint = failure.hint if failure is not None and failure.hint else NOT_RUNNING
    return GateError(f"{subject} is refused: {reasons}", hint=f"{hint}; kept in {artifact.folder}")
