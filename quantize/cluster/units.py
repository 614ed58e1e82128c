"""Recipes side by side on a cluster: each group of variants that share work goes to one node.

In: plans, a store and a cache that all nodes see. Out: Outcomes, as `execute` gives them. On its node a task executes
a part of a plan; one calibration pass is spread over several nodes where there are more nodes than passes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quantize.build.execute import drop_intermediates, execute
from quantize.build.execution import RunOptions
from quantize.build.job import VariantJob
from quantize.build.outcome import Outcome, OutcomeState
from quantize.build.plan import Plan, confirm
from quantize.build.spread.cluster import (
    Cluster,
    Handle,
    Inside,
    Lost,
    Node,
    Takes,
    WorkFailed,
    able_nodes,
    connected,
    working_nodes,
)
from quantize.build.spread.trace import Span, check_trace, read_trace, write_trace
from quantize.calibration.spread import PassSpread
from quantize.errors import BuildError, QuantizeError, UsageError, first_line
from quantize.events import Event, note, status
from quantize.formats.base import RunLimits
from quantize.recipe.model import Recipe
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache

WORKERS_A_NODE = 4  # of a spread pass, on nodes without GPUs: each holds a block
RETRIES = 5  # of a task whose node or process died
POLL_SECONDS = 0.5
WATCH_SECONDS = 2.0


@dataclass(frozen=True)
class ClusterOptions:
    """Which cluster, and what to show of it. threads: cores of a build or worker, None for what the nodes suggest."""

    address: str
    threads: int | None = None
    trace: Path | None = None
    watch: bool = False


@dataclass(frozen=True)
class Unit:
    """The part of a plan whose variants are built together. work: in bytes to go through, for sorting only."""

    plan: Plan
    calibrated: bool
    work: float

    @property
    def variants(self) -> tuple[str, ...]:
        """By name."""
        return tuple(job.name for job in self.plan.jobs)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.plan.recipe.name}: {', '.join(self.variants)}"


@dataclass(frozen=True)
class Done:
    """What a task brings back. node: its name. Seconds since the epoch, by the node's clock."""

    outcomes: tuple[Outcome, ...]
    node: str
    started: float
    ended: float


@dataclass(frozen=True)
class Sizes:
    """What one unit takes of a node, and how many fit the cluster; the same for the workers of a spread pass."""

    cores: int
    gpus: int
    places: int
    worker_cores: int
    workers: int

    @classmethod
    def of(cls, found: Sequence[Node], *, gpu: bool, threads: int | None) -> Sizes:
        """On nodes with GPUs, one place a GPU; on others one place a node, or as many as have `threads` cores."""
        if gpu:
            cores = threads or max(1, min(node.cpus // node.gpus for node in found))
            places = sum(min(node.gpus, node.cpus // cores) for node in found)
            return cls(cores, 1, places, cores, places)
        cores = threads or min(node.cpus for node in found)
        worker_cores = threads or max(1, cores // WORKERS_A_NODE)
        places, workers = (sum(node.cpus // size for node in found) for size in (cores, worker_cores))
        if places == 0:
            most = max(node.cpus for node in found)
            raise UsageError(f"no node has {cores} cores; the largest has {most}", hint=f"use --threads {most}")
        return cls(cores, 0, places, worker_cores, workers)


def execute_on_cluster(
    plans: Sequence[Plan], workspace: Workspace, run: RunOptions, cluster: ClusterOptions
) -> list[tuple[Recipe, Outcome]]:
    """Make what the plans say on the nodes of a cluster; outcomes in their order.

    A recipe that is given twice is built once; what one plan can't, is in its outcomes. Raises UsageError: no cluster
    answers, the trace can't be written.
    """
    if cluster.trace is not None:
        check_trace(cluster.trace)
    store, cache = Store(workspace.store.root.absolute()), Cache(workspace.cache.root.absolute())
    workspace = Workspace(store, cache, workspace.reporter)
    found = {plan.recipe.path.absolute(): plan for plan in plans}
    plans = [replace(plan, recipe=replace(plan.recipe, path=path)) for path, plan in found.items()]
    units = sorted((unit for plan in plans for unit in _units(plan)), key=lambda unit: -unit.work)
    with connected(cluster.address) as connection:
        outcomes = _Flight(connection, units, workspace, run, cluster).all()
    if not run.keep_intermediates:
        worked = {path for (path, _), outcome in outcomes.items() if outcome.state is not OutcomeState.UP_TO_DATE}
        for plan in plans:
            if plan.recipe.path in worked:
                drop_intermediates(plan, workspace)
    names = [(plan.recipe, job.name) for plan in plans for job in plan.jobs]
    return [(recipe, outcomes[recipe.path, name]) for recipe, name in names if (recipe.path, name) in outcomes]


def _units(plan: Plan) -> Iterator[Unit]:
    """All calibrated variants share a pass; others share what their format makes for them."""
    source_bytes = sum(item.size_bytes for item in plan.source.files)
    groups: dict[str, list[VariantJob]] = {}
    for job in plan.jobs:
        groups.setdefault("" if job.is_calibrated else job.variant.format, []).append(job)
    spec = plan.recipe.calibration
    tokens = spec.tokens if spec is not None else 0
    for key, jobs in groups.items():
        passes = len(jobs) + (tokens / 1000 if key == "" else 0)
        yield Unit(plan.part(jobs), key == "", source_bytes * passes)


class _Flight:
    """The units on their way through one cluster."""

    def __init__(
        self, connection: Cluster, units: Sequence[Unit], workspace: Workspace, run: RunOptions, cluster: ClusterOptions
    ) -> None:
        self._connection, self._units, self._run, self._cluster = connection, units, run, cluster
        self._workspace, self._reporter = workspace, workspace.reporter
        gpu = run.limits.on_gpu
        found = working_nodes(connection, gpu=gpu)
        self._sizes = Sizes.of(found, gpu=gpu, threads=cluster.threads)
        calibrated = sum(unit.calibrated for unit in units)
        self._spread = 0 < calibrated < self._sizes.places
        self._workers_each = max(1, self._sizes.workers // max(1, calibrated))
        cores = sum(node.cpus for node in found)
        counts = f"nodes: {len(found)}, cores: {cores}, builds: {len(units)}, at a time: {self._sizes.places}"
        note(self._reporter, "", counts)
        self._mailbox = connection.start(Mailbox, (), Takes())
        self._running: dict[Handle, Unit] = {}
        self._spans: list[Span] = []
        self._outcomes: dict[tuple[Path, str], Outcome] = {}
        self._began, self._work_done, self._said = time.monotonic(), 0.0, 0.0

    def all(self) -> dict[tuple[Path, str], Outcome]:
        """Outcomes by (recipe's path, variant's name)."""
        for number, unit in enumerate(self._units):
            needs, limits = self._needs(unit, number)
            run = replace(self._run, limits=limits, keep_intermediates=True)
            places = self._workspace.store.root, self._workspace.cache.root
            arguments = (unit.plan, *places, run, self._mailbox, self._connection.inside)
            self._running[self._connection.submit(run_unit_here, arguments, needs, tries=RETRIES + 1)] = unit
        while self._running:
            done = self._connection.done([*self._running], POLL_SECONDS)
            self._relay()
            for handle in done:
                unit = self._running.pop(handle)
                self._landed(unit, self._result(unit, handle))
            self._watch()
        self._relay()
        if self._cluster.trace is not None:
            self._write_trace(self._cluster.trace)
        return self._outcomes

    def _needs(self, unit: Unit, number: int) -> tuple[Takes, RunLimits]:
        """What a unit takes of a node, and its limits; one that is spread waits for its workers, who take cores."""
        limits, sizes = self._run.limits, self._sizes
        device = "cuda" if sizes.gpus else "cpu"
        if not (self._spread and unit.calibrated):
            needs = Takes(sizes.cores, sizes.gpus if unit.calibrated else 0, limits.memory_budget_bytes or 0)
            return needs, replace(limits, threads=sizes.cores, device=device if unit.calibrated else "cpu")
        trace = _part_of(self._cluster.trace.absolute(), number) if self._cluster.trace is not None else None
        spread = PassSpread(
            "", self._workers_each, sizes.worker_cores, sizes.gpus, limits.memory_budget_bytes or 0, trace,
            self._cluster.watch,
        )  # fmt: skip
        return Takes(), replace(limits, threads=sizes.cores, device=device, spread=spread)

    def _result(self, unit: Unit, handle: Handle) -> Done:
        try:
            found: Done = self._connection.get(handle)
            return found
        except (Lost, WorkFailed) as exc:
            cause = exc.cause if isinstance(exc, WorkFailed) else exc
            error = cause if isinstance(cause, QuantizeError) else BuildError(f"{unit.name}: {first_line(cause)}")
            now = time.time()
            outcomes = tuple(Outcome(name, OutcomeState.FAILED, error=error) for name in unit.variants)
            return Done(outcomes, "", now, now)

    def _landed(self, unit: Unit, done: Done) -> None:
        self._spans.append(Span(f"node {done.node[:6]}", "build", "build", unit.name, done.started, done.ended))
        self._work_done += unit.work
        for outcome in done.outcomes:
            self._outcomes[unit.plan.recipe.path, outcome.variant] = outcome
        if not self._run.keep_going and any(item.error for item in done.outcomes):
            for handle, waiting in self._running.items():
                self._connection.cancel(handle)
                for name in waiting.variants:
                    self._outcomes[waiting.plan.recipe.path, name] = Outcome(name, OutcomeState.SKIPPED)
            self._running.clear()

    def _relay(self) -> None:
        (taken,) = self._connection.call(self._mailbox, "take", ())
        for recipe, event in self._connection.get(taken):
            subject = f"{recipe}/{event.subject}" if event.subject else recipe
            self._reporter.emit(replace(event, subject=subject))

    def _watch(self) -> None:
        now = time.monotonic()
        if not self._cluster.watch or now - self._said < WATCH_SECONDS:
            return
        self._said, spent = now, now - self._began
        total = sum(unit.work for unit in self._units)
        left = f", about {spent * (total - self._work_done) / self._work_done:,.0f} s left" if self._work_done else ""
        busy = min(len(self._running), self._sizes.places)
        alive = len(able_nodes(self._connection, gpu=self._sizes.gpus > 0))
        counts = f"running {busy}, waiting {len(self._running) - busy}, done {len(self._units) - len(self._running)}"
        status(self._reporter, "cluster", f"nodes {alive}; builds: {counts}{left}")

    def _write_trace(self, path: Path) -> None:
        """One file of all: the units, and what the spread passes among them left."""
        spans = list(self._spans)
        for number in range(len(self._units)):
            part = _part_of(path.absolute(), number)
            if part.is_file():
                spans += read_trace(part)
                part.unlink()
        write_trace(path, spans, self._reporter)


def _part_of(path: Path, number: int) -> Path:
    return path.with_name(f".{path.name}.{number}")


class Mailbox:
    """Events on their way from the nodes to the terminal."""

    def __init__(self) -> None:
        self._events: list[tuple[str, Event]] = []

    def put(self, recipe: str, event: Event) -> None:
        """Keep one event."""
        self._events.append((recipe, event))

    def take(self) -> list[tuple[str, Event]]:
        """All events since the last call."""
        events, self._events = self._events, []
        return events


class MailReporter:
    """Sends events to the mailbox; waits for nothing."""

    def __init__(self, inside: Inside, mailbox: Handle, recipe: str) -> None:
        self._inside, self._mailbox, self._recipe = inside, mailbox, recipe

    def emit(self, event: Event) -> None:
        """Send one event."""
        self._inside.tell(self._mailbox, "put", self._recipe, event)


def run_unit_here(plan: Plan, store: Path, cache: Path, run: RunOptions, mailbox: Handle, inside: Inside) -> Done:
    """A part of a plan, executed on the node that was chosen for it; its pass may be spread over others.

    Raises BuildError, PlanError: what the plan was made of is not on the node.
    """
    here = inside.here()
    os.environ["OMP_NUM_THREADS"] = str(run.limits.threads)  # a scheduler may have set it to what the task reserves
    if run.limits.spread is not None:
        spread = replace(run.limits.spread, address=inside.address())
        run = replace(run, limits=replace(run.limits, spread=spread))
    if not plan.recipe.path.is_file():
        hint = "put recipes, sources, cache and store on storage that every node has under the same path"
        raise BuildError(f"node {here.name[:6]} does not see {plan.recipe.path}", hint=hint)
    workspace = Workspace(Store(store), Cache(cache), MailReporter(inside, mailbox, plan.recipe.name))
    started = time.time()
    outcomes = execute(confirm(plan, workspace), workspace, run)
    return Done(tuple(outcomes), here.name, started, time.time())
