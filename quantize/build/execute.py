"""Plan -> Artifacts: the only module that wires the steps together.

In: a recipe, a store, a cache, how to run. Out: one Outcome a variant. One variant's failure does not end the others.
Order: pin the source, skip what is built, one calibration pass for all that need it, then build, verify, measure, hold
the gates, commit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantize.build.assemble import Made, assemble
from quantize.build.disk import disk_free_bytes, most_bytes
from quantize.build.job import VariantJob
from quantize.build.judge import Judge
from quantize.build.outcome import Outcome, OutcomeState
from quantize.build.plan import Plan, identify_jobs, pin_calibration, size_plan
from quantize.build.settle import GateKeeper
from quantize.errors import DiskFullError, QuantizeError, Stopped, StoreError, UsageError, VerifyError
from quantize.events import Event, EventKind, Reporter, SilentReporter, note, status, warn
from quantize.formats import builders
from quantize.formats.base import Context, RunLimits
from quantize.model.checkpoint import Checkpoint
from quantize.model.source import PinnedSource, open_source, pin_source
from quantize.recipe.model import Recipe, Variant
from quantize.store.artifact import (
    UNJUDGED,
    Artifact,
    keep_only,
    set_aside,
    settle,
)
from quantize.store.staging import clear_leftovers, clear_pass, pass_workplace, store_errors, variant_lock, workplace
from quantize.store.store import Store
from quantize.system.cache import Cache


@dataclass(frozen=True)
class BuildOptions:
    """How to run; nothing here changes the weights that are built.

    keep_intermediates: leave in the cache what GGUF variants share. evaluate: measure what is built, and hold the
    recipe's gates; False leaves it "not evaluated". accept_risk: why an artifact that its gates refuse is taken all the
    same; it goes into the manifest.
    """

    limits: RunLimits = field(default_factory=RunLimits)
    keep_going: bool = True
    force: bool = False
    only: tuple[str, ...] = ()
    keep_intermediates: bool = False
    evaluate: bool = True
    accept_risk: str | None = None


@dataclass
class _Work:
    """One variant on its way: its job and the folders that it holds."""

    job: VariantJob
    context: Context
    started: float


class _Build:
    """One run over one recipe; keeps what all its steps share."""

    def __init__(self, recipe: Recipe, store: Store, cache: Cache, reporter: Reporter, run: BuildOptions) -> None:
        recipe = pin_calibration(recipe, reporter)
        self.recipe, self.store, self.cache, self.reporter, self.run = recipe, store, cache, reporter, run
        self.source: PinnedSource = pin_source(recipe, cache, reporter)
        judge = Judge(recipe, self.source, cache, run.limits)
        self.gates = GateKeeper(judge, store.root, reporter, evaluate=run.evaluate, accept_risk=run.accept_risk)
        self.outcomes: dict[str, Outcome] = {}
        self.jobs: list[VariantJob] = []
        self.checkpoint: Checkpoint

    def all(self) -> list[Outcome]:
        try:
            return self._all()
        except DiskFullError as exc:
            self._say_what_is_missing(exc)
            raise

    def _all(self) -> list[Outcome]:
        jobs = self._wanted(identify_jobs(self.recipe, self.source, self.store))
        todo = [job for job in jobs if self.run.force or self._found(job) is None]
        waiting = [job for job in jobs if job not in todo and not self._is_settled(job)]
        if todo or waiting:
            self.jobs = [replace(job, existing=None) for job in todo]
            self._check_room()
            self.checkpoint = open_source(self.source, self.cache, self.reporter)
            todo = [job for job in todo if self._checked(job)]
            self._prepare(todo, waiting)
            for job in waiting:
                self._settle_waiting(job)
            self._build_calibrated([job for job in todo if job.builder.needs_calibration(job.variant.options)])
            for job in todo:
                if not job.builder.needs_calibration(job.variant.options) and self._goes_on(job):
                    with ExitStack() as held:
                        if (work := self._open_work(job, held)) is not None:
                            self._build_one(work)
            if not self.run.keep_intermediates:
                _remove_intermediates([job.variant for job in todo], self.source, self.checkpoint, self.cache)
        clear_pass(self.store.root, self.recipe.name)
        return [self.outcomes[job.variant.name] for job in jobs]

    def _check_room(self) -> None:
        """Refuse a build that would fill a disk or its memory, before it has written anything. Raises PlanError."""
        if not self.jobs:
            return
        most = most_bytes(self.jobs, self.recipe, self.source, measured=self._measures(self.jobs))
        roomy = all(disk_free_bytes(root) >= most for root in (self.store.root, self.cache.root))
        if roomy and self.run.limits.memory_budget_bytes is None:
            return
        refused = self._size(self.jobs, self.reporter).shortage(self.run.limits)
        if refused is not None:
            raise refused

    def _size(self, jobs: Sequence[VariantJob], reporter: Reporter) -> Plan:
        arguments = (self.recipe, self.source, jobs, self.store, self.cache, reporter, self.run.limits)
        return size_plan(*arguments, measured=self._measures(jobs))

    def _measures(self, jobs: Sequence[VariantJob]) -> bool:
        """Whether any of the jobs is to be measured against the source."""
        return any(self.gates.measures(job.variant.format) for job in jobs)

    def _say_what_is_missing(self, error: DiskFullError) -> None:
        """Put into the hint how much more space the rest of the build needs than there is."""
        left = [job for job in self.jobs if self._found(job) is None]
        try:
            found = self._size(left, SilentReporter()).rooms
        except (QuantizeError, OSError):  # no room even for that
            return
        short = [room for room in found if room.missing_bytes]
        if short:
            missing = " and ".join(f"{room.missing_bytes:,} bytes are missing for the {room.what}" for room in short)
            error.hint = f"{missing}: free them and run the same build again, it goes on where it stopped"

    def _wanted(self, jobs: list[VariantJob]) -> list[VariantJob]:
        return [job for job in jobs if not self.run.only or job.variant.name in self.run.only]

    def _found(self, job: VariantJob) -> Artifact | None:
        """The build of a job that there is: a good one, or one that was refused or has no figures yet."""
        if job.refusal is not None:
            return None
        wanted = (self.recipe.name, job.variant.name, job.build_key)
        return self.store.find_build(*wanted) or self.store.find_aside(*wanted)

    def _is_settled(self, job: VariantJob) -> bool:
        """Whether an artifact is where its known figures put it, so that nothing is left to do; then it is reported."""
        artifact = self._found(job)
        settled = self.gates.settled(artifact) if artifact is not None else None
        if settled is None:
            return False
        if settled.error is None:
            settle(self.store.root, settled.artifact)
        state = OutcomeState.UP_TO_DATE if settled.error is None else OutcomeState.REFUSED
        self._finished(Outcome(job.variant.name, state, settled.artifact, settled.error))
        return True

    def _prepare(self, todo: Sequence[VariantJob], waiting: Sequence[VariantJob]) -> None:
        """The source's side of the evaluation, before anything is built."""
        found = [(job, self._found(job)) for job in waiting]
        unknown = [job for job, artifact in found if artifact and self.gates.judge.known(artifact) is None]
        measured = [job for job in (*todo, *unknown) if self.gates.measures(job.variant.format)]
        if measured:
            calibrated = any(job.builder.needs_calibration(job.variant.options) for job in measured)
            self.gates.judge.prepare(self.checkpoint, self.reporter, calibrated=calibrated)

    def _settle_waiting(self, job: VariantJob) -> None:
        with variant_lock(self.store.root, self.recipe.name, job.variant.name):
            clear_leftovers(self.store.root, self.recipe.name, job.variant.name)
            artifact = self._found(job)
            try:
                if artifact is None:
                    raise StoreError(f"{job.variant.name}: its build is gone", hint="run the same build again")
                self._settle(artifact, OutcomeState.EVALUATED)
            except QuantizeError as exc:
                self._finished(Outcome(job.variant.name, OutcomeState.FAILED, artifact, exc))

    def _settle(
        self, artifact: Artifact, state: OutcomeState, seconds: float = 0.0, failure: VerifyError | None = None
    ) -> None:
        """Have the gates put an artifact where it belongs, and report it. Only call under the variant's lock."""
        settled = self.gates.settle(artifact, self.checkpoint, failure=failure, anew=state is OutcomeState.BUILT)
        if settled.error is not None:
            state = OutcomeState.REFUSED
        elif settled.record is None and state is OutcomeState.EVALUATED:
            state = OutcomeState.UP_TO_DATE
        self._finished(Outcome(artifact.manifest.variant, state, settled.artifact, settled.error, seconds))

    def _goes_on(self, job: VariantJob) -> bool:
        """Whether to begin with a job after what has failed: what lacks space would only fail as well."""
        errors = [item.error for item in self.outcomes.values() if item.error is not None]
        if not errors or (self.run.keep_going and not any(isinstance(item, DiskFullError) for item in errors)):
            return True
        self._finished(Outcome(job.variant.name, OutcomeState.SKIPPED))
        return False

    def _checked(self, job: VariantJob) -> bool:
        try:
            if job.refusal is not None:
                raise job.refusal
            job.builder.check(self.checkpoint, job.variant.options)
        except QuantizeError as exc:
            self._finished(Outcome(job.variant.name, OutcomeState.FAILED, error=exc))
            return False
        return True

    def _open_work(self, job: VariantJob, held: ExitStack) -> _Work | None:
        """Take the variant's lock and a staging folder; None if another build made it while we waited."""
        name = job.variant.name
        held.enter_context(variant_lock(self.store.root, self.recipe.name, name))
        existing = self._found(job)
        if existing is not None and not self.run.force:
            note(self.reporter, name, "another build has just made it")
            self._settle(existing, OutcomeState.UP_TO_DATE)
            return None
        folders = workplace(self.store.root, self.recipe.name, name, job.inputs, anew=self.run.force)
        place = held.enter_context(folders)
        if place.changed:
            warn(self.reporter, name, f"the stopped build is of no use, it starts over: {'; '.join(place.changed)}")
        context = Context(
            name, job.variant.options, self.source, self.checkpoint, self.cache, place.staging, place.scratch,
            self.run.limits,
        )  # fmt: skip
        return _Work(job, context, time.perf_counter())

    def _build_calibrated(self, jobs: Sequence[VariantJob]) -> None:
        """All calibrated variants of the recipe, from one pass over the blocks."""
        if not jobs:
            return
        with ExitStack() as held:
            works = []
            for job in sorted(jobs, key=lambda item: item.variant.name):  # one order, so that two builds can't deadlock
                if (work := self._open_work(job, held)) is not None:
                    works.append(work)
            if works:
                with pass_workplace(self.store.root, self.recipe.name) as folder:
                    self._run_pass(works, folder)

    def _run_pass(self, works: list[_Work], folder: Path) -> None:
        from quantize.build.calibrate import run_pass

        variants = [(item.job.builder.name, item.context) for item in works]
        try:
            passed = run_pass(self.recipe, variants, folder, self.reporter)
        except Stopped:
            raise
        except QuantizeError as exc:
            self._failed(exc, *works)
            return
        for work in works:
            error = passed.errors.get(work.context.variant)
            if error is not None:
                self._finished(Outcome(work.context.variant, OutcomeState.FAILED, error=error))
            elif self._goes_on(work.job):
                work.context = replace(work.context, calibration=passed.entry, device=passed.device)
                self._build_one(work, {"calibration_pass": passed.measurements})

    def _build_one(self, work: _Work, measured: dict[str, Any] | None = None) -> None:
        job, context = work.job, work.context
        try:
            with store_errors(self.store.root):
                result = job.builder.build(context, self.reporter)
            facts, failure = self._verified(work)
            status(self.reporter, context.variant, "hashing and writing the manifest")
            seconds = time.perf_counter() - work.started
            made = Made(result, {**(measured or {}), "verify": facts}, seconds)
            with store_errors(self.store.root):
                manifest = assemble(self.recipe, job, context, made)
                keep_only(context.staging, manifest)
            self._settle(
                set_aside(self.store.root, context.staging, manifest, UNJUDGED), OutcomeState.BUILT, seconds, failure
            )
        except QuantizeError as exc:
            self._failed(exc, work)

    def _failed(self, error: QuantizeError, *works: _Work) -> None:
        if isinstance(error, DiskFullError):
            self._say_what_is_missing(error)
        for work in works:
            seconds = time.perf_counter() - work.started
            self._finished(Outcome(work.context.variant, OutcomeState.FAILED, error=error, seconds=seconds))

    def _verified(self, work: _Work) -> tuple[dict[str, Any], VerifyError | None]:
        """What verification found out, or why it refuses."""
        context = work.context
        try:
            return dict(work.job.builder.verify(context.staging, self.checkpoint, context.limits, self.reporter)), None
        except VerifyError as exc:
            return {}, exc

    def _finished(self, outcome: Outcome) -> None:
        self.outcomes[outcome.variant] = outcome
        if outcome.error is not None:
            self.reporter.emit(Event(EventKind.FAILED, outcome.variant, str(outcome.error)))
        elif outcome.state is OutcomeState.SKIPPED:
            warn(self.reporter, outcome.variant, "skipped: another variant failed")
        else:
            where = f": {outcome.artifact.folder}" if outcome.artifact else ""
            self.reporter.emit(Event(EventKind.DONE, outcome.variant, f"{outcome.state}{where}"))


def build(
    recipe: Recipe, store: Store, cache: Cache, reporter: Reporter, run: BuildOptions | None = None
) -> list[Outcome]:
    """Build every variant of a recipe that is not up to date.

    Raises CheckpointError, PlanError, MissingExtraError for what stops all of them; the rest is in the outcomes.
    """
    run = run or BuildOptions()
    unknown = sorted(set(run.only) - {variant.name for variant in recipe.variants})
    if unknown:
        names = ", ".join(variant.name for variant in recipe.variants)
        raise UsageError(f"the recipe has no variant {unknown[0]!r}", hint=f"it has: {names}")
    return _Build(recipe, store, cache, reporter, replace(run)).all()


def drop_intermediates(recipe: Recipe, cache: Cache, reporter: Reporter) -> None:
    """Drop what builds with `keep_intermediates` have left in the cache. Raises CheckpointError."""
    source = pin_source(recipe, cache, reporter)
    _remove_intermediates(recipe.variants, source, open_source(source, cache, reporter), cache)


def _remove_intermediates(
    variants: Sequence[Variant], source: PinnedSource, checkpoint: Checkpoint, cache: Cache
) -> None:
    """Drop what the variants made for one another; what is left to build of this source makes it again."""
    for variant in variants:
        context = Context("", variant.options, source, checkpoint, cache, cache.root, cache.root)
        for kind, key in builders()[variant.format].intermediates(context):
            cache.remove_unused(kind, key)
