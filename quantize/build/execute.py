"""Plan -> Artifacts: the only module that wires the steps together.

In: a plan, a workspace, how to run. Out: one Outcome a variant. One variant's failure does not end the others.
Order: skip what is built, one calibration pass for all that need it, then build, verify, measure, hold the gates,
commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from quantize.build.calibrate import run_pass
from quantize.build.execution import Execution, RunOptions
from quantize.build.job import VariantJob
from quantize.build.judge import Judge
from quantize.build.make import Work, make, working
from quantize.build.outcome import Ledger, Outcome, OutcomeState
from quantize.build.plan import Plan, find_existing, is_refused_by_others, look
from quantize.build.settle import GateKeeper, Gates, NoGates
from quantize.build.size import check_room, say_what_is_missing
from quantize.errors import DiskFullError, QuantizeError, Stopped, StoreError
from quantize.evaluate.job import Ride
from quantize.events import note
from quantize.formats.base import Context
from quantize.model.checkpoint import Checkpoint
from quantize.model.source import open_source
from quantize.model.towers import say_text_alone
from quantize.store.artifact import Artifact, settle
from quantize.store.staging import clear_leftovers, clear_pass, pass_workplace, variant_lock
from quantize.store.workspace import Workspace


def execute(plan: Plan, workspace: Workspace, run: RunOptions | None = None) -> list[Outcome]:
    """Make what the plan says, as far as the store does not have it by now; one outcome a job, in the plan's order.

    Raises CheckpointError, PlanError, MissingExtraError for what stops all of them; the rest is in the outcomes.
    """
    run = run or RunOptions()
    plan = look(plan, workspace.store)
    ledger, gates = Ledger(workspace.reporter, keep_going=run.keep_going), _gates(plan, workspace, run)
    todo = [job for job in plan.jobs if job.existing is None]
    waiting = [job for job in plan.jobs if job.existing and not _is_settled(job.existing, gates, ledger, workspace)]
    if todo or waiting:
        try:
            if todo:
                check_room(plan.part(todo), workspace, run.limits)
            checkpoint = open_source(plan.source, workspace.cache, workspace.reporter)
            say_text_alone(checkpoint, workspace.reporter)
            _work(todo, waiting, Execution(plan, workspace, run, checkpoint, gates, ledger))
        except DiskFullError as exc:
            _say_what_is_missing(exc, plan.part(todo), workspace, run, ledger)
            raise
    clear_pass(workspace.store.root, plan.recipe.name)
    return [ledger.outcomes[job.name] for job in plan.jobs]


def _gates(plan: Plan, workspace: Workspace, run: RunOptions) -> Gates:
    if not run.judge:
        return NoGates(workspace)
    judge = Judge(plan.recipe, plan.source, workspace.cache, run.limits)
    return GateKeeper(judge, workspace, evaluate=plan.evaluate, accept_risk=run.accept_risk)


def _is_settled(artifact: Artifact, gates: Gates, ledger: Ledger, workspace: Workspace) -> bool:
    """Whether an artifact is where its known figures put it, so that nothing is left to do; then it is reported."""
    settled = gates.settled(artifact)
    if settled is None:
        return False
    if settled.error is None:
        settle(workspace.store.root, settled.artifact)
    state = OutcomeState.UP_TO_DATE if settled.error is None else OutcomeState.REFUSED
    ledger.add(Outcome(artifact.manifest.variant, state, settled.artifact, settled.error))
    return True


def _work(todo: Sequence[VariantJob], waiting: Sequence[VariantJob], at: Execution) -> None:
    """Build one part of the jobs, settle the other."""
    todo = [job for job in todo if _is_sound(job, at)]
    calibrated = [job for job in todo if job.is_calibrated]
    rides = bool(calibrated) and not waiting and at.run.limits.takes_passengers
    ride = at.gates.prepare([*todo, *waiting], at.checkpoint, rides=rides)
    for job in waiting:
        _settle_waiting(job, at)
    _build_calibrated(calibrated, at, ride)
    for job in todo:
        if not job.is_calibrated and at.ledger.goes_on(job.name):
            with ExitStack() as held:
                if (work := _begin(job, at, held)) is not None:
                    _finish(work, at, {})
    if not at.run.keep_intermediates:
        _remove_intermediates(at.plan.part(todo), at.checkpoint, at.workspace)


def _is_sound(job: VariantJob, at: Execution) -> bool:
    """Whether nothing that is known from headers keeps a job from being built."""
    try:
        if job.refusal is not None:
            raise job.refusal
        job.check(at.checkpoint, at.plan.recipe.calibration)
    except QuantizeError as exc:
        at.ledger.add(Outcome(job.name, OutcomeState.FAILED, error=exc))
        return False
    return True


def _settle_waiting(job: VariantJob, at: Execution) -> None:
    """Have the gates look at what an earlier build left to them."""
    name = at.plan.recipe.name
    with variant_lock(at.root, name, job.name):
        clear_leftovers(at.root, name, job.name)
        artifact = find_existing(at.plan, job, at.workspace.store)
        try:
            if artifact is None:
                raise StoreError(f"{job.name}: its build is gone", hint="run the same build again")
            _settle_existing(artifact, OutcomeState.EVALUATED, at)
        except QuantizeError as exc:
            at.ledger.add(Outcome(job.name, OutcomeState.FAILED, artifact, exc))


def _settle_existing(artifact: Artifact, state: OutcomeState, at: Execution) -> None:
    """Have the gates put an artifact where it belongs, and report it. Only call under the variant's lock."""
    settled = at.gates.settle(artifact, at.checkpoint)
    if settled.error is not None:
        state = OutcomeState.REFUSED
    elif settled.record is None:
        state = OutcomeState.UP_TO_DATE
    at.ledger.add(Outcome(artifact.manifest.variant, state, settled.artifact, settled.error))


def _begin(job: VariantJob, at: Execution, held: ExitStack) -> Work | None:
    """Take the variant's lock and folders to work in; None if another build made it while we waited."""
    held.enter_context(variant_lock(at.root, at.plan.recipe.name, job.name))
    existing = find_existing(at.plan, job, at.workspace.store)
    if existing is not None:
        note(at.workspace.reporter, job.name, "another build has just made it")
        _settle_existing(existing, OutcomeState.UP_TO_DATE, at)
        return None
    aside = at.workspace.store.find_aside(at.plan.recipe.name, job.name, job.build_key)
    if not at.plan.force and any(map(is_refused_by_others, aside)):
        note(at.workspace.reporter, job.name, "it did not run by an earlier version's checks: it is built again")
    return held.enter_context(working(job, at))


def _build_calibrated(jobs: Sequence[VariantJob], at: Execution, ride: Ride | None) -> None:
    """All calibrated variants of the plan, from one pass over the blocks. ride: of the source's own evaluation."""
    if not jobs:
        return
    with ExitStack() as held:
        works = []
        for job in sorted(jobs, key=lambda item: item.name):  # one order, so that two builds can't deadlock
            if (work := _begin(job, at, held)) is not None:
                works.append(work)
        if works:
            with pass_workplace(at.root, at.plan.recipe.name) as folder:
                _run_pass(works, folder, at, ride)


def _run_pass(works: Sequence[Work], folder: Path, at: Execution, ride: Ride | None) -> None:
    variants = [(work.job.variant.format, work.context) for work in works]
    try:
        passed = run_pass(at.plan.recipe, variants, folder, at.workspace.reporter, ride)
    except Stopped:
        raise
    except QuantizeError as exc:
        _failed(exc, works, at)
        return
    if ride is not None:
        at.gates.prepare([work.job for work in works], at.checkpoint)
    for work in works:
        error = passed.errors.get(work.job.name)
        if error is not None:
            at.ledger.add(Outcome(work.job.name, OutcomeState.FAILED, error=error))
        elif at.ledger.goes_on(work.job.name):
            checkpoint = replace(work.context.checkpoint, wide=passed.wide)
            context = replace(work.context, calibration=passed.entry, device=passed.device, checkpoint=checkpoint)
            _finish(replace(work, context=context), at, {"calibration_pass": passed.measurements})


def _finish(work: Work, at: Execution, measured: dict[str, object]) -> None:
    """Make a variant, and have the gates put it where it belongs."""
    try:
        made = make(work, at, measured)
        settled = at.gates.settle(made.artifact, at.checkpoint, failure=made.failure, anew=True)
    except QuantizeError as exc:
        _failed(exc, [work], at)
        return
    state = OutcomeState.BUILT if settled.error is None else OutcomeState.REFUSED
    at.ledger.add(Outcome(work.job.name, state, settled.artifact, settled.error, made.seconds))


def _failed(error: QuantizeError, works: Iterable[Work], at: Execution) -> None:
    if isinstance(error, DiskFullError):
        _say_what_is_missing(error, at.plan, at.workspace, at.run, at.ledger)
    for work in works:
        at.ledger.add(Outcome(work.job.name, OutcomeState.FAILED, error=error, seconds=work.seconds))


def _say_what_is_missing(
    error: DiskFullError, plan: Plan, workspace: Workspace, run: RunOptions, ledger: Ledger
) -> None:
    """For what has not been made by now."""
    left = [job for job in look(plan, workspace.store).jobs if job.existing is None and not ledger.has_made(job.name)]
    say_what_is_missing(error, plan.part(left), workspace, run.limits)


def drop_intermediates(plan: Plan, workspace: Workspace) -> None:
    """Drop what builds with `keep_intermediates` have left in the cache. Raises CheckpointError."""
    _remove_intermediates(plan, open_source(plan.source, workspace.cache, workspace.reporter), workspace)


def _remove_intermediates(plan: Plan, checkpoint: Checkpoint, workspace: Workspace) -> None:
    """Drop what the variants made for one another; what is left to build of this source makes it again."""
    cache = workspace.cache
    for job in plan.jobs:
        context = Context("", job.variant.options, plan.source, checkpoint, cache, cache.root, cache.root)
        for kind, key in job.builder.intermediates(context):
            cache.remove_unused(kind, key)
