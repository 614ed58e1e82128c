"""The workers of a spread pass: objects on a cluster's nodes that come, work and die.

In: how many there may be, calls. Out: their answers, or that they are gone. Left to others: which calls (spread), what
a call does (passwork).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from quantize.build.spread.cluster import Cluster, Handle, Inside, Lost, Takes, WorkFailed
from quantize.calibration.spread import PassSpread
from quantize.errors import BuildError, OutOfMemory, PlanError, QuantizeError, first_line, is_out_of_memory
from quantize.events import Event, Reporter, note, warn

if TYPE_CHECKING:
    from quantize.build.spread.passwork import PassPlan
    from quantize.calibration.stream import Precision

Result = TypeVar("Result")
PROBE_NAME = ".seen-by-all"
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class WorkerMachine:
    """What a worker's results depend on beside its inputs, and where it is. node: its name."""

    device: str
    precision: Precision
    versions: tuple[str, ...]
    node: str
    address: str
    process: int
    sees: bool

    @property
    def kind(self) -> tuple[str, ...]:
        """What must be equal on all machines for equal bits."""
        return (self.device, *self.versions)


@dataclass(frozen=True)
class WorkerReport:
    """What comes back with every answer. Seconds since the epoch, by the worker's clock."""

    started: float
    ended: float
    events: tuple[Event, ...]
    error: QuantizeError | None = None
    answer: Any = None


@dataclass
class PoolWorker:
    """One worker. machine: None until it has answered. task: what it was given last, None while it is free."""

    name: str
    actor: Handle
    machine: WorkerMachine | None = None
    task: Any = None
    results: tuple[Handle, ...] = ()


class Pool:
    """Up to `spread.workers` workers; one that dies is replaced as soon as the cluster has room."""

    def __init__(self, cluster: Cluster, spread: PassSpread, device: str, folder: Path, reporter: Reporter) -> None:
        self._cluster, self._device, self._folder, self._reporter = cluster, device, folder, reporter
        self._plan: Handle | None = None
        self._kind: tuple[str, ...] | None = None
        self._waiting: dict[Handle, PoolWorker] = {}  # the handle of a worker's answer -> the worker
        self._early: list[tuple[PoolWorker, WorkerMachine]] = []  # that have answered before there was a plan
        self._present: set[str] = set()
        self._count = 0
        (folder / PROBE_NAME).write_text("for other nodes to see", encoding="utf-8")
        self._needs = Takes(spread.cores, spread.gpus, spread.memory_bytes)
        for _ in range(spread.workers):
            self._add()

    def first_machine(self) -> WorkerMachine:
        """What the first worker to answer says of itself; those that differ from it take no part."""
        while not self._early:
            self.wait(POLL_SECONDS)
        return self._early[0][1]

    def begin(self, plan: PassPlan) -> None:
        """Give all workers, also those to come, the plan of the pass."""
        self._plan = self._cluster.put(plan)
        for worker, _ in self._early:
            self.call(worker, None, "begin", (self._plan,), 1)

    def call(self, worker: PoolWorker, task: Any, method: str, arguments: Sequence[Any], results: int) -> None:
        """Have a free worker do something; its first result is a WorkerReport."""
        worker.task, worker.results = task, self._cluster.call(worker.actor, method, arguments, results)
        self._waiting[worker.results[0]] = worker

    def wait(self, seconds: float) -> list[tuple[PoolWorker, WorkerReport | Lost | None]]:
        """Workers that have answered, or are gone; None: it is new, and ready for work."""
        if not self._waiting:
            return []
        found: list[tuple[PoolWorker, WorkerReport | Lost | None]] = []
        for handle in self._cluster.done([*self._waiting], seconds):
            worker = self._waiting.pop(handle)
            answer = self._answer(worker, handle)
            if isinstance(answer, WorkerMachine):
                self._welcome(worker, answer)
            else:
                found.append((worker, answer))
        return found

    def __len__(self) -> int:
        """Workers that take part."""
        return len(self._present)

    def live_nodes(self) -> set[str]:
        """Names of the nodes that are alive."""
        return {node.name for node in self._cluster.nodes()}

    def close(self) -> None:
        """End all workers."""
        for worker in self._waiting.values():
            self._cluster.end(worker.actor)
        (self._folder / PROBE_NAME).unlink(missing_ok=True)

    def release(self, worker: PoolWorker) -> None:
        """End a worker that has nothing left to do: what it took of its node is for others."""
        self._cluster.end(worker.actor)

    def _add(self) -> None:
        actor = self._cluster.start(Actor, (self._cluster.inside,), self._needs)
        worker = PoolWorker(f"worker {self._count}", actor)
        self._count += 1
        (answer,) = self._cluster.call(actor, "hello", (self._device, str(self._folder / PROBE_NAME)))
        self._waiting[answer] = worker

    def _answer(self, worker: PoolWorker, handle: Handle) -> WorkerMachine | WorkerReport | Lost | None:
        try:
            answer: WorkerMachine | WorkerReport | None = self._cluster.get(handle)
        except Lost as lost:
            if lost.data:
                return lost
            self._present.discard(worker.name)
            self._add()
            return Lost(f"{worker.name} is gone: {lost}", data=False)
        except WorkFailed as exc:
            if isinstance(exc.cause, QuantizeError):
                raise exc.cause from None
            raise BuildError(f"{worker.name}: {type(exc.cause).__name__}: {first_line(exc.cause)}") from exc
        return answer

    def _welcome(self, worker: PoolWorker, machine: WorkerMachine) -> None:
        """Take a new worker in, unless its results could differ from the others'."""
        if not machine.sees:
            raise PlanError(
                f"node {machine.address} does not see {self._folder}",
                hint="put source, cache and store on storage that every node has under the same path",
            )
        self._kind = self._kind or machine.kind
        if machine.kind != self._kind:
            pairs = zip(machine.kind, self._kind, strict=True)
            differ = "; ".join(f"{found} instead of {wanted}" for found, wanted in pairs if found != wanted)
            warn(self._reporter, "", f"node {machine.address} takes no part, its bits could differ: {differ}")
            self.release(worker)
            return
        note(
            self._reporter,
            "",
            f"{worker.name} is process {machine.process} on node {machine.node[:6]}, {machine.address}",
        )
        worker.machine = machine
        self._present.add(worker.name)
        if self._plan is None:
            self._early.append((worker, machine))
        else:
            self.call(worker, None, "begin", (self._plan,), 1)


class Actor:
    """A PassWorker in a process of a node; says when it did what."""

    def __init__(self, inside: Inside) -> None:
        from quantize.system.process import settle_libraries

        settle_libraries()
        self._inside = inside
        self._work: Any = None

    def hello(self, device: str, probe: str) -> WorkerMachine:
        """What this machine is."""
        from quantize import __version__
        from quantize.calibration.stream import fastest_precision
        from quantize.store.manifest import tool_versions
        from quantize.system.processor import device_name

        here = self._inside.here()
        versions = {"quantize": __version__, **tool_versions(("torch", "transformers"))}
        shown = tuple(f"{name} {version}" for name, version in versions.items())
        name, precision = device_name(device), fastest_precision(device)
        return WorkerMachine(name, precision, shown, here.name, here.address, os.getpid(), Path(probe).is_file())

    def begin(self, plan: PassPlan) -> None:
        """Get ready for the pass."""
        import torch

        from quantize.build.spread.passwork import PassWorker

        torch.set_num_threads(plan.parts[0][1].limits.threads)
        self._work = PassWorker(plan)

    def guide(self, share: int) -> WorkerReport:
        """See PassWorker."""
        started = time.time()
        return self._report(started, self._roomy(lambda: self._work.guide(share)))

    def forward(
        self, share: int, block: int, saved: Any, record: bool, tables: Sequence[Any] = ()
    ) -> tuple[WorkerReport, Any]:
        """See PassWorker; the sums are a result of their own, which stays on this node until it is asked for."""
        started = time.time()
        after, sums = self._roomy(lambda: self._work.forward(share, block, saved, tables, record=record))
        return self._report(started, after), sums

    def complete(self, block: int, keys: Sequence[str], shares: Sequence[Any]) -> tuple[Any, ...]:
        """See PassWorker; the shares are fetched one after another, and each Gram matrix is a result of its own."""
        started = time.time()
        grams = self._roomy(lambda: self._work.complete(block, map(self._inside.fetch, shares)))
        return (self._report(started), *(grams[key] for key in keys))

    def solve(
        self, block: int, part: int, piece: int, tables: Sequence[Any], keys: Sequence[str], *grams: Any
    ) -> WorkerReport:
        """See PassWorker; a failure is the variant's own, and comes back as its answer."""
        started = time.time()
        inputs = dict(zip(keys, grams, strict=True))
        try:
            return self._report(started, self._roomy(lambda: self._work.solve(block, part, piece, inputs, tables)))
        except OutOfMemory:  # would be the next variant's too
            raise
        except QuantizeError as exc:
            return self._report(started, error=exc)
        except (RuntimeError, ValueError, OSError) as exc:  # torch reports nearly everything as RuntimeError
            return self._report(started, error=BuildError(first_line(exc)))

    def _roomy(self, work: Callable[[], Result]) -> Result:
        """What it gives; where a GPU's memory runs out, once more with less in it. Raises OutOfMemory."""
        try:
            return work()
        except (RuntimeError, QuantizeError) as exc:
            if not is_out_of_memory(exc):
                raise
            if not self._work.on_gpu:
                hint = "give a worker more with --memory-budget, or fewer workers to a node"
                raise OutOfMemory(f"a worker ran out of memory: {first_line(exc)}", hint=hint) from exc
        self._work.make_room()
        try:
            return work()
        except (RuntimeError, QuantizeError) as exc:
            if not is_out_of_memory(exc):
                raise
            hint = "give a worker a whole GPU, take cards with more memory, or build without --device cuda"
            raise OutOfMemory(f"a worker ran out of its GPU's memory: {first_line(exc)}", hint=hint) from exc

    def _report(self, started: float, answer: Any = None, error: QuantizeError | None = None) -> WorkerReport:
        return WorkerReport(started, time.time(), tuple(self._work.take_events()), error, answer)
