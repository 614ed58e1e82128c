"""Recipes side by side on a cluster: each group of variants that share work is a task of Ray's for one node.

In: recipes, a store and a cache that all nodes see. Out: Outcomes, as `build` gives them. On its node a task is the
ordinary build; one calibration pass is spread over several nodes where there are more nodes than passes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantize.build.execute import BuildOptions, build, drop_intermediates
from quantize.build.outcome import Outcome, OutcomeState
from quantize.build.plan import pin_calibration
from quantize.build.spread.session import Node, able_nodes, cause_of, connected, working_nodes
from quantize.build.spread.trace import Span, check_trace, read_trace, write_trace
from quantize.calibration.spread import PassSpread
from quantize.errors import BuildError, QuantizeError, UsageError, first_line
from quantize.events import Event, Reporter, note, status
from quantize.formats import builders
from quantize.model.source import pin_source
from quantize.recipe.model import Recipe
from quantize.store.store import Store
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
    """Variants of one recipe that are built together. work: in bytes to go through, for sorting only."""

    recipe: Recipe
    variants: tuple[str, ...]
    calibrated: bool
    work: float

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.recipe.name}: {', '.join(self.variants)}"


@dataclass(frozen=True)
class Done:
    """What a task brings back. node: Ray's id. Seconds since the epoch, by the node's clock."""

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


def build_on_cluster(
    recipes: Sequence[Recipe],
    store: Store,
    cache: Cache,
    reporter: Reporter,
    run: BuildOptions,
    cluster: ClusterOptions,
) -> list[tuple[Recipe, Outcome]]:
    """Build the variants of all recipes that are not up to date, on the nodes of a cluster; outcomes in recipes' order.

    A recipe that is given twice is built once; what one recipe can't, is in its outcomes. Raises UsageError: no cluster
    answers, a variant is not in its recipe, the trace can't be written.
    """
    if cluster.trace is not None:
        check_trace(cluster.trace)
    store, cache = Store(store.root.absolute()), Cache(cache.root.absolute())
    found = {item.path.absolute(): item for item in recipes}
    recipes = [pin_calibration(replace(item, path=path), reporter) for path, item in found.items()]
    units = sorted(
        (unit for recipe in recipes for unit in _units(recipe, cache, reporter, run.only)), key=lambda unit: -unit.work
    )
    with connected(cluster.address) as ray:
        flight = _Flight(ray, units, store, cache, reporter, run, cluster)
        outcomes = flight.all()
    if not run.keep_intermediates:
        worked = {path for (path, _), outcome in outcomes.items() if outcome.state is not OutcomeState.UP_TO_DATE}
        for recipe in recipes:
            if recipe.path in worked:
                drop_intermediates(recipe, cache, reporter)
    names = [(recipe, variant.name) for recipe in recipes for variant in recipe.variants]
    return [(recipe, outcomes[recipe.path, name]) for recipe, name in names if (recipe.path, name) in outcomes]


def _units(recipe: Recipe, cache: Cache, reporter: Reporter, only: Sequence[str]) -> Iterator[Unit]:
    """All calibrated variants share a pass; others share what their format makes for them."""
    source_bytes = sum(item.size_bytes for item in pin_source(recipe, cache, reporter).files)
    groups: dict[str, list[str]] = {}
    for variant in recipe.variants:
        calibrated = builders()[variant.format].needs_calibration(variant.options)
        if not only or variant.name in only:
            groups.setdefault("" if calibrated else variant.format, []).append(variant.name)
    spec = recipe.calibration
    tokens = spec.samples * spec.sequence_length if spec is not None else 0
    for key, names in groups.items():
        passes = len(names) + (tokens / 1000 if key == "" else 0)
        yield Unit(recipe, tuple(names), key == "", source_bytes * passes)


class _Flight:
    """The units on their way through one cluster."""

    def __init__(
        self, ray: Any, units: Sequence[Unit], store: Store, cache: Cache, reporter: Reporter, run: BuildOptions,
        cluster: ClusterOptions,
    ) -> None:  # fmt: skip
        self._ray, self._units, self._reporter, self._run, self._cluster = ray, units, reporter, run, cluster
        self._store, self._cache = store, cache
        gpu = run.limits.device != "cpu"
        found = working_nodes(ray, gpu=gpu)
        self._sizes = Sizes.of(found, gpu=gpu, threads=cluster.threads)
        calibrated = sum(unit.calibrated for unit in units)
        self._spread = 0 < calibrated < self._sizes.places
        self._workers_each = max(1, self._sizes.workers // max(1, calibrated))
        cores = sum(node.cpus for node in found)
        counts = f"nodes: {len(found)}, cores: {cores}, builds: {len(units)}, at a time: {self._sizes.places}"
        note(reporter, "", counts)
        self._mailbox = ray.remote(Mailbox).options(num_cpus=0).remote()
        self._running: dict[Any, Unit] = {}
        self._spans: list[Span] = []
        self._outcomes: dict[tuple[Path, str], Outcome] = {}
        self._began, self._work_done, self._said = time.monotonic(), 0.0, 0.0

    def all(self) -> dict[tuple[Path, str], Outcome]:
        """Outcomes by (recipe's path, variant's name)."""
        run_unit = self._ray.remote(run_unit_here)
        for number, unit in enumerate(self._units):
            options, limits = self._needs(unit, number)
            task = run_unit.options(max_retries=RETRIES, scheduling_strategy="SPREAD", **options)
            run = replace(self._run, limits=limits, only=unit.variants, keep_intermediates=True)
            reference = task.remote(unit.recipe, self._store.root, self._cache.root, run, self._mailbox)
            self._running[reference] = unit
        while self._running:
            done, _ = self._ray.wait([*self._running], num_returns=1, timeout=POLL_SECONDS)
            self._relay()
            for reference in done:
                unit = self._running.pop(reference)
                self._landed(unit, self._result(unit, reference))
            self._watch()
        self._relay()
        if self._cluster.trace is not None:
            self._write_trace(self._cluster.trace)
        return self._outcomes

    def _needs(self, unit: Unit, number: int) -> tuple[dict[str, Any], Any]:
        """Ray resources of a unit, and its limits; one that is spread waits for its workers, which take the cores."""
        limits, sizes = self._run.limits, self._sizes
        device = "cuda" if sizes.gpus else "cpu"
        memory = {"memory": limits.memory_budget_bytes} if limits.memory_budget_bytes else {}
        if not (self._spread and unit.calibrated):
            options = {"num_cpus": sizes.cores, "num_gpus": sizes.gpus if unit.calibrated else 0, **memory}
            return options, replace(limits, threads=sizes.cores, device=device if unit.calibrated else "cpu")
        trace = _part_of(self._cluster.trace.absolute(), number) if self._cluster.trace is not None else None
        spread = PassSpread(
            "", self._workers_each, sizes.worker_cores, sizes.gpus, limits.memory_budget_bytes or 0, trace,
            self._cluster.watch,
        )  # fmt: skip
        return {"num_cpus": 0}, replace(limits, threads=sizes.cores, device=device, spread=spread)

    def _result(self, unit: Unit, reference: Any) -> Done:
        try:
            found: Done = self._ray.get(reference)
            return found
        except self._ray.exceptions.RayError as exc:
            cause = cause_of(exc)
            error = cause if isinstance(cause, QuantizeError) else BuildError(f"{unit.name}: {first_line(cause)}")
            now = time.time()
            outcomes = tuple(Outcome(name, OutcomeState.FAILED, error=error) for name in unit.variants)
            return Done(outcomes, "", now, now)

    def _landed(self, unit: Unit, done: Done) -> None:
        self._spans.append(Span(f"node {done.node[:6]}", "build", "build", unit.name, done.started, done.ended))
        self._work_done += unit.work
        for outcome in done.outcomes:
            self._outcomes[unit.recipe.path, outcome.variant] = outcome
        if not self._run.keep_going and any(item.error for item in done.outcomes):
            for reference, waiting in self._running.items():
                self._ray.cancel(reference)
                for name in waiting.variants:
                    self._outcomes[waiting.recipe.path, name] = Outcome(name, OutcomeState.SKIPPED)
            self._running.clear()

    def _relay(self) -> None:
        for recipe, event in self._ray.get(self._mailbox.take.remote()):
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
        alive = len(able_nodes(self._ray, gpu=self._sizes.gpus > 0))
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

    def __init__(self, mailbox: Any, recipe: str) -> None:
        self._mailbox, self._recipe = mailbox, recipe

    def emit(self, event: Event) -> None:
        """Send one event."""
        self._mailbox.put.remote(self._recipe, event)


def run_unit_here(recipe: Recipe, store: Path, cache: Path, run: BuildOptions, mailbox: Any) -> Done:
    """A unit, on the node that Ray has chosen: the ordinary build, whose pass may be spread over others."""
    import ray

    here = ray.get_runtime_context()
    os.environ["OMP_NUM_THREADS"] = str(run.limits.threads)  # Ray has set it to what the task reserves: 1 for none
    if run.limits.spread is not None:
        spread = replace(run.limits.spread, address=here.gcs_address)
        run = replace(run, limits=replace(run.limits, spread=spread))
    if not recipe.path.is_file():
        hint = "put recipes, sources, cache and store on storage that every node has under the same path"
        raise BuildError(f"node {here.get_node_id()[:6]} does not see {recipe.path}", hint=hint)
    started = time.time()
    outcomes = build(recipe, Store(store), Cache(cache), MailReporter(mailbox, recipe.name), run)
    return Done(tuple(outcomes), here.get_node_id(), started, time.time())
