"""What the workers of a spread pass do next: forward passes of shares, sums, solves. Pure bookkeeping, without Ray.

In: who is free, what is done, what is lost. Out: tasks. A share goes through the blocks in order, apart from the other
shares; a block's sums are added up when all shares have gone through it; its solves follow, while the forward pass goes
on. At most `in_flight` blocks are under way between the first forward pass and the last solve.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

GUIDE, FORWARD, COMPLETE, SOLVE = "guide", "forward", "complete", "solve"


@dataclass(frozen=True)
class Task:
    """One call of a worker. number: the share of a forward pass or of guided statistics, the part of a solve. piece: of
    a solve. record: keep statistics.
    """

    kind: str
    block: int
    number: int = 0
    piece: int = 0
    record: bool = True


@dataclass
class _BlockState:
    """Where the results of a block are: worker names by share, of its sums; (part, piece) of those that are solved."""

    forwards: dict[int, Hashable] = field(default_factory=dict)
    complete: Hashable | None = None
    solves: set[tuple[int, int]] = field(default_factory=set)


class Schedule:
    """The pass over blocks [start, blocks).

    firsts: for each part, the first block that it lacks. pieces: for each part, the number of pieces of each block.
    start: the block whose input the shares have. guided: what each token counts is found first, share by share.
    """

    def __init__(
        self, pieces: Sequence[Sequence[int]], shares: int, firsts: Sequence[int], start: int, in_flight: int,
        *, guided: bool = False,
    ) -> None:  # fmt: skip
        self._unguided = set(range(shares)) if guided else set[int]()
        self._pieces, self._shares, self._in_flight = pieces, shares, max(1, in_flight)
        blocks = self._blocks = len(pieces[0])
        self._firsts = dict(enumerate(firsts))
        self._record_from = min(firsts, default=blocks)
        self._at = dict.fromkeys(range(shares), start)  # the next block of each share
        self._owner: dict[int, Hashable] = {}
        self._again: list[tuple[int, int]] = []  # (block, share) whose sums are lost
        self._running: dict[Task, Hashable] = {}
        self._states: dict[int, _BlockState] = {}
        self._solved = self._record_from  # blocks before it are solved by all parts

    @property
    def solved_blocks(self) -> int:
        """Blocks that every part has solved, without a gap."""
        return self._solved

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self._solved >= self._blocks or not self._firsts

    def waiting(self) -> int:
        """Tasks that could run now and are given to nobody."""
        return len(self._ready())

    def next(self, worker: Hashable) -> Task | None:
        """The most urgent task for a free worker, which has it from now on; None if there is none."""
        ready = self._ready()
        if not ready:
            return None
        task = min(ready, key=lambda item: self._urgency(item, worker))
        self._running[task] = worker
        if task.kind == FORWARD:
            self._owner[task.number] = worker
        return task

    def done(self, task: Task) -> None:
        """A worker has finished a task."""
        worker = self._running.pop(task)
        if task.kind == GUIDE:
            self._unguided.discard(task.number)
            return
        state = self._states.setdefault(task.block, _BlockState())
        if task.kind == FORWARD:
            if (task.block, task.number) in self._again:
                self._again.remove((task.block, task.number))
            else:
                self._at[task.number] = task.block + 1
            if task.record:
                state.forwards[task.number] = worker
        elif task.kind == COMPLETE:
            state.complete = worker
        else:
            state.solves.add((task.number, task.piece))
        self._advance()

    def failed(self, task: Task) -> None:
        """A task ended without a result: somebody else gets it."""
        self._running.pop(task)

    def leave(self, part: int) -> None:
        """A part takes no more blocks."""
        self._firsts.pop(part, None)
        self._advance()

    def lose_worker(self, worker: Hashable) -> None:
        """A worker is gone: nobody waits for it; what it gave back is still there."""
        self._owner = {share: owner for share, owner in self._owner.items() if owner != worker}

    def lose_results(self, block: int, workers: Iterable[Hashable]) -> None:
        """What these workers gave for a block is gone, where it is still needed: it is made again."""
        state, gone = self._states.get(block), set(workers)
        if state is None or block < self._solved:
            return
        if state.complete is not None and self._solves(block) <= state.solves:
            return  # it waits for earlier blocks only
        state.forwards = {share: worker for share, worker in state.forwards.items() if worker not in gone}
        if state.complete in gone:
            state.complete = None
        if state.complete is None:
            lost = {share for share, at in self._at.items() if at > block} - set(state.forwards)
            self._again += sorted({(block, share) for share in lost} - set(self._again))

    def open_blocks(self) -> list[int]:
        """Blocks with results that are still needed."""
        return [block for block in sorted(self._states) if block >= self._solved]

    def _ready(self) -> list[Task]:
        if self._unguided:  # a token's weight is relative to the mean of all
            waiting = [Task(GUIDE, 0, share) for share in self._unguided]
            return [task for task in waiting if task not in self._running]
        found = [Task(FORWARD, block, share) for block, share in self._again]
        limit = min(self._blocks, self._solved + self._in_flight)
        for share, block in self._at.items():
            if block < limit:
                found.append(Task(FORWARD, block, share, record=block >= self._record_from))
        for block, state in self._states.items():
            if block < self._solved:
                continue
            if state.complete is None:
                found += [Task(COMPLETE, block)] if len(state.forwards) == self._shares else []
            else:
                lacking = self._solves(block) - state.solves
                found += [Task(SOLVE, block, part, piece) for part, piece in lacking]
        return [task for task in found if task not in self._running and not self._is_moving(task)]

    def _is_moving(self, task: Task) -> bool:
        """Whether a share is in somebody's hands: it goes through one block at a time."""
        return task.kind == FORWARD and any(
            other.kind == FORWARD and other.number == task.number for other in self._running
        )

    def _urgency(self, task: Task, worker: Hashable) -> tuple[int, ...]:
        """Sums first, then solves, then forward passes; early blocks first; a worker's own shares before others'."""
        kind = {GUIDE: 0, COMPLETE: 0, SOLVE: 1, FORWARD: 2}[task.kind]
        owner = self._owner.get(task.number, worker) if task.kind == FORWARD else worker
        unowned = task.kind == FORWARD and task.number not in self._owner
        place = 0 if owner == worker and not unowned else 1 if unowned else 2
        return kind, task.block, place, task.number, task.piece

    def _solves(self, block: int) -> set[tuple[int, int]]:
        """(part, piece) of all solves of a block."""
        parts = [part for part, first in self._firsts.items() if first <= block]
        return {(part, piece) for part in parts for piece in range(self._pieces[part][block])}

    def _advance(self) -> None:
        while self._solved < self._blocks:
            state = self._states.get(self._solved, _BlockState())
            if state.complete is None or not self._solves(self._solved) <= state.solves:
                return
            self._states.pop(self._solved)
            self._solved += 1
