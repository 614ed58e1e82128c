"""A calibration pass that many workers share: what the pass on one machine does, with the same bits.

In: workers, a schedule, what each variant lacks. Out: blocks solved, handed over in order. Each block's hidden states
are on shared storage before the next one needs them, so a worker that dies costs its share of one block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from quantize.build.spread.cluster import Cluster, Handle, Lost, connected
from quantize.build.spread.cost import pass_costs
from quantize.build.spread.passwork import PassPlan, deal, share_folder
from quantize.build.spread.pool import Pool, PoolWorker, WorkerMachine, WorkerReport
from quantize.build.spread.schedule import COMPLETE, FORWARD, GUIDE, Schedule, Task
from quantize.build.spread.trace import Span, write_trace
from quantize.build.spread.watch import PassWatch
from quantize.calibration.hidden_states import SavedStates, remove_before
from quantize.calibration.spread import PassSpread
from quantize.calibration.token_weights import WeightTable
from quantize.errors import BuildError
from quantize.events import Reporter, progress, status, warn
from quantize.model.architecture import block_layout
from quantize.model.layout import BlockLayout
from quantize.system.cache import hash_file

MOST_IN_FLIGHT = 4
STORE_SHARE = 0.5  # of the nodes' object stores, for blocks under way: nothing is ever spilled
POLL_SECONDS = 0.5
MOST_DEATHS = 3  # of workers with the same task in hand
BEGIN = Task("the start", -1)  # what a worker has in hand before its first task

# What becomes of a finished block: (block, the answers or errors of each part's pieces and their seconds, the input of
# the next one by share) -> the parts that take no more.
Take = Callable[[int, Mapping[int, tuple[list[Any], float]], Sequence[SavedStates]], Sequence[int]]


@dataclass(frozen=True)
class Lacking:
    """What a part still needs: blocks from `first` on, each in pieces that can be solved apart."""

    first: int
    pieces: Sequence[Sequence[BlockLayout]]


@contextmanager
def spread_over(spread: PassSpread, device: str, folder: Any, reporter: Reporter) -> Iterator[SpreadPass]:
    """A pass on the workers of a cluster, as long as the context is open. Raises UsageError: no cluster answers."""
    with connected(spread.address) as cluster:
        status(reporter, "", f"waiting for workers: up to {spread.workers} with {spread.cores} cores each")
        pool = Pool(cluster, spread, device, folder, reporter)
        try:
            yield SpreadPass(cluster, pool, spread, reporter)
        finally:
            pool.close()


class SpreadPass:
    """One pass: keeps workers busy until every part has every block."""

    def __init__(self, cluster: Cluster, pool: Pool, spread: PassSpread, reporter: Reporter) -> None:
        self._cluster, self._pool, self._spread, self._reporter = cluster, pool, spread, reporter
        self._free: list[PoolWorker] = []
        self._saved: dict[tuple[int, int], SavedStates] = {}  # (share, block) -> the block's input
        self._sums: dict[tuple[int, int], Handle] = {}  # (block, share)
        self._tables: dict[int, WeightTable] = {}  # share -> what its tokens count
        self._grams: dict[int, dict[str, Handle]] = {}  # by block and key
        self._solved: dict[int, dict[tuple[int, int], tuple[Any, float]]] = {}
        self._nodes: dict[str, str] = {}  # worker -> node
        self._deaths: dict[Task, int] = {}
        self._spans: list[Span] = []

    @property
    def machine(self) -> WorkerMachine:
        """What the workers are: waits for the first one."""
        return self._pool.first_machine()

    def run(self, plan: PassPlan, parts: Sequence[Lacking], saved: Sequence[SavedStates], take: Take) -> None:
        """Have every part see the blocks that it lacks.

        saved: the shares' hidden states of a stopped pass, () for none. Raises what a worker raises,
        what `take` raises, BuildError where workers die over the same task again and again.
        """
        self._plan, self._parts, self._config = plan, parts, plan.parts[0][1].checkpoint.config
        firsts = [part.first for part in parts]
        self._shares = deal(plan.token_ids, plan.parts[0][1].limits.device)
        costs = pass_costs(plan)
        self._blocks = len(costs)
        start = self._start(saved, min(firsts))
        in_flight = self._in_flight(max(cost.gram_bytes for cost in costs))
        pieces = [[len(layouts) for layouts in part.pieces] for part in parts]
        guided = plan.guided is not None
        self._schedule = Schedule(pieces, len(self._shares), firsts, start, in_flight, guided=guided)
        formats = [name for name, _ in plan.parts]
        self._watch = PassWatch(self._reporter, costs, formats, pieces, len(self._shares), shown=self._spread.watch)
        self._pool.begin(plan)
        try:
            with ThreadPoolExecutor(1) as writer:
                self._drive(writer, take)
        finally:
            if self._spread.trace is not None:
                write_trace(self._spread.trace, self._spans, self._reporter)

    def _start(self, saved: Sequence[SavedStates], first: int) -> int:
        """The block that the shares go on at: that of saved states, if they are of these shares and help."""
        blocks = {item.block for item in saved}
        if len(saved) != len(self._shares) or len(blocks) != 1 or max(blocks) > first:
            return 0
        for share, item in enumerate(saved):
            path = share_folder(self._plan.folder, share) / item.file
            if not path.is_file() or hash_file(path) != item.sha256:
                text = "the hidden states of the stopped build are damaged or gone; the blocks are run again"
                warn(self._reporter, "", text)
                return 0
        self._saved = {(share, item.block): item for share, item in enumerate(saved)}
        return blocks.pop()

    def _in_flight(self, gram_bytes: int) -> int:
        """Blocks between the first forward pass and the last solve, so that their sums fit the object stores."""
        room = STORE_SHARE * sum(node.store_bytes for node in self._cluster.nodes())
        fitting = int(room // (gram_bytes * (len(self._shares) + 1)))
        if fitting < 1:
            needed = gram_bytes * (len(self._shares) + 1) / STORE_SHARE
            hint = "start nodes with a larger object store, or more nodes"
            raise BuildError(f"a block's sums take {needed / 1e9:.1f} GB of the cluster's object stores", hint=hint)
        return min(MOST_IN_FLIGHT, fitting)

    def _drive(self, writer: ThreadPoolExecutor, take: Take) -> None:
        writing: list[Future[Sequence[int]]] = []
        handed = self._schedule.solved_blocks
        while writing or handed < self._schedule.solved_blocks or not self._schedule.finished:
            while writing and (writing[0].done() or len(writing) > 1 or self._schedule.finished):
                for part in writing.pop(0).result():
                    self._schedule.leave(part)
            for block in range(handed, self._schedule.solved_blocks):
                writing.append(writer.submit(self._hand_over, take, block))
                progress(self._reporter, "", "calibration pass, blocks", block + 1, self._blocks)
                handed = block + 1
            self._give_out()
            if self._schedule.finished:
                continue
            for worker, outcome in self._pool.wait(POLL_SECONDS):
                self._heard(worker, outcome)
            self._watch.show(self._schedule, len(self._pool))

    def _give_out(self) -> None:
        """A task for every free worker, as far as there are some."""
        for worker in list(self._free):
            task = self._schedule.next(worker.name)
            if task is not None:
                self._free.remove(worker)
                self._watch.began(worker, task)
                self._call(worker, task)

    def _call(self, worker: PoolWorker, task: Task) -> None:
        block = task.block
        if task.kind == GUIDE:
            self._pool.call(worker, task, "guide", (task.number,), 1)
            return
        if task.kind == FORWARD:
            saved = self._saved.get((task.number, block))
            self._pool.call(worker, task, "forward", (task.number, block, saved, task.record, self._all_tables), 2)
            return
        keys = tuple(block_layout(self._config, block).inputs)
        if task.kind == COMPLETE:
            sums = [self._sums[block, share] for share in range(len(self._shares))]
            self._pool.call(worker, task, "complete", (block, keys, sums), 1 + len(keys))
        else:
            keys = tuple(self._parts[task.number].pieces[block][task.piece].inputs)
            grams = [self._grams[block][key] for key in keys]
            self._pool.call(worker, task, "solve", (block, task.number, task.piece, self._all_tables, keys, *grams), 1)

    @property
    def _all_tables(self) -> list[WeightTable]:
        """What the tokens of each share count, by share."""
        return [table for _, table in sorted(self._tables.items())]

    def _heard(self, worker: PoolWorker, outcome: WorkerReport | Lost | None) -> None:
        if isinstance(outcome, Lost):
            self._lost(worker, outcome)
            return
        if worker.machine is not None:
            self._nodes[worker.name] = worker.machine.node
        if outcome is not None:
            self._finished(worker, worker.task, outcome)
        worker.task = None
        self._free.append(worker)

    def _finished(self, worker: PoolWorker, task: Task, report: WorkerReport) -> None:
        for event in report.events:
            self._reporter.emit(event)
        self._note_time(worker, task, report)
        if task.kind == GUIDE:
            self._tables[task.number] = report.answer
        elif task.kind == FORWARD:
            if report.answer is not None:
                self._saved[task.number, task.block + 1] = report.answer
            if task.record:
                self._sums[task.block, task.number] = worker.results[1]
        elif task.kind == COMPLETE:
            keys = block_layout(self._config, task.block).inputs
            self._grams[task.block] = dict(zip(keys, worker.results[1:], strict=True))
        else:
            answer = report.answer if report.error is None else report.error
            solved = self._solved.setdefault(task.block, {})
            solved[task.number, task.piece] = (answer, report.ended - report.started)
        self._schedule.done(task)
        worker.results = ()
        first = self._schedule.solved_blocks
        self._grams = {block: grams for block, grams in self._grams.items() if block >= first}
        self._sums = {where: sums for where, sums in self._sums.items() if where[0] >= first}

    def _lost(self, worker: PoolWorker, lost: Lost) -> None:
        """Have done again what a dead worker had in hand, and what was on a dead node."""
        task: Task | None = worker.task
        if task is not None:
            self._schedule.failed(task)
            worker.task = None
        if not lost.data:
            warn(self._reporter, "", f"{lost}; what it had in hand is given to another")
            self._schedule.lose_worker(worker.name)
            self._count_death(task or BEGIN)
        alive = self._pool.live_nodes()
        gone = {name for name, node in self._nodes.items() if node not in alive}
        if lost.data:
            self._free.append(worker)
            if task is not None:
                gone = gone or set(self._nodes)
                self._count_death(task)
        for block in self._schedule.open_blocks():
            self._schedule.lose_results(block, gone)

    def _count_death(self, task: Task) -> None:
        self._deaths[task] = self._deaths.get(task, 0) + 1
        if self._deaths[task] > MOST_DEATHS:
            hint = "did it run out of memory? Give a worker more with --memory-budget, or fewer workers to a node"
            what = task.kind if task == BEGIN else f"the {task.kind} of block {task.block}"
            raise BuildError(f"{what} failed on {MOST_DEATHS + 1} workers", hint=hint)

    def _hand_over(self, take: Take, block: int) -> Sequence[int]:
        """Give a solved block to whoever writes it; then hidden states before the next one are of no more use."""
        started = time.time()
        found: dict[int, tuple[list[Any], float]] = {}
        for (part, _), (answer, seconds) in sorted(self._solved.pop(block, {}).items(), key=lambda item: item[0]):
            answers, before = found.get(part, ([], 0.0))
            found[part] = ([*answers, answer], before + seconds)
        after = [self._saved[share, block + 1] for share in range(len(self._shares)) if block + 1 < self._blocks]
        leaving = take(block, found, after)
        for share in range(len(self._shares)):
            remove_before(share_folder(self._plan.folder, share), block + 1)
        self._spans.append(Span("driver", "writer", "write", f"write {block}", started, time.time(), block))
        return leaving

    def _note_time(self, worker: PoolWorker, task: Task, report: WorkerReport) -> None:
        assert worker.machine is not None
        share = f"share {task.number}"
        what = {GUIDE: share, FORWARD: share, COMPLETE: "sum"}.get(task.kind)
        what = what or f"{self._plan.parts[task.number][1].variant} {task.piece}"
        node = f"{worker.machine.address} {worker.machine.node[:6]}"
        name = f"{task.kind} {task.block}: {what}"
        self._spans.append(Span(node, worker.name, task.kind, name, report.started, report.ended, task.block))
        self._watch.ended(task)
