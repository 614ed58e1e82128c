"""What a spread pass tells those who watch it: each worker's task, blocks, queue, the time that is left.

In: tasks as they begin and end. Out: events, one line a worker; the terminal redraws them in place.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantize.build.spread.cost import BlockCost
from quantize.build.spread.schedule import FORWARD, GUIDE, SOLVE, Schedule, Task
from quantize.events import Reporter, status
from quantize.formats import builders

if TYPE_CHECKING:
    from quantize.build.spread.pool import PoolWorker

EVERY_SECONDS = 1.0


class PassWatch:
    """Keeps count of the work that is done; says nothing unless `shown`."""

    def __init__(
        self, reporter: Reporter, costs: Sequence[BlockCost], formats: Sequence[str], pieces: Sequence[Sequence[int]],
        shares: int, *, shown: bool,
    ) -> None:  # fmt: skip
        self._reporter, self._costs, self._formats, self._shown = reporter, costs, formats, shown
        self._pieces, self._shares = pieces, shares
        self._total = sum(
            cost.forward + cost.gram + sum(builders()[name].solve_operations(cost) for name in formats)
            for cost in costs
        )
        self._done = 0.0
        self._began = time.monotonic()
        self._said = 0.0

    def began(self, worker: PoolWorker, task: Task) -> None:
        """A worker has a new task."""
        if self._shown and worker.machine is not None:
            what = f"share {task.number}" if task.kind in (GUIDE, FORWARD) else ""
            what = self._formats[task.number] if task.kind == SOLVE else what
            where = f"{worker.machine.address} {worker.machine.node[:6]} {worker.name}"
            status(self._reporter, where, f"{task.kind} of block {task.block} {what}".rstrip())

    def ended(self, task: Task) -> None:
        """A task is done."""
        cost = self._costs[task.block]
        if task.kind == FORWARD:
            self._done += (cost.forward + cost.gram) / self._shares
        elif task.kind == SOLVE:
            self._done += (
                builders()[self._formats[task.number]].solve_operations(cost) / self._pieces[task.number][task.block]
            )

    def left_seconds(self) -> float | None:
        """What is left at the pace so far; None before anything is done."""
        spent = time.monotonic() - self._began
        return spent * (self._total - self._done) / self._done if self._done else None

    def show(self, schedule: Schedule, workers: int) -> None:
        """Say how far the pass is, not more often than once in a while."""
        now = time.monotonic()
        if not self._shown or now - self._said < EVERY_SECONDS:
            return
        self._said = now
        left = self.left_seconds()
        text = (
            f"{workers} workers, {schedule.solved_blocks} of {len(self._costs)} blocks, {schedule.waiting()} tasks wait"
        )
        status(self._reporter, "pass", text if left is None else f"{text}, about {left:,.0f} s left")
