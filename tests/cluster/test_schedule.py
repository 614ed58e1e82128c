"""Who does what next: any order of answers, failures and dead workers leads to every block once, in the right order."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.build.spread.schedule import COMPLETE, FORWARD, SOLVE, Schedule, Task


@dataclass(frozen=True)
class Case:
    """A pass. pieces: for each part, of each block."""

    blocks: int
    pieces: tuple[tuple[int, ...], ...]
    shares: int
    firsts: tuple[int, ...]
    start: int
    in_flight: int
    workers: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    blocks = draw(st.integers(1, 6))
    firsts = tuple(draw(st.lists(st.integers(0, blocks), min_size=1, max_size=3)))
    start = draw(st.integers(0, min(firsts)))
    of_block = st.lists(st.integers(1, 3), min_size=blocks, max_size=blocks).map(tuple)
    pieces = tuple(draw(of_block) for _ in firsts)
    shares, in_flight, workers = (draw(st.integers(1, most)) for most in (5, 3, 4))
    return Case(blocks, pieces, shares, firsts, start, in_flight, workers)


class Pass:
    """Follows a schedule, and holds it to what it promises."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.schedule = Schedule(case.pieces, case.shares, case.firsts, case.start, case.in_flight)
        self.running: dict[int, Task] = {}
        self.sums: dict[tuple[int, int], int] = {}  # (block, share) -> the worker that has them
        self.grams: dict[int, int] = {}
        self.solved: set[tuple[int, int, int]] = set()
        self.reached = dict.fromkeys(range(case.shares), case.start)
        self.finished: list[Task] = []

    def give_out(self) -> None:
        for worker in range(self.case.workers):
            if worker not in self.running and (task := self.schedule.next(worker)) is not None:
                self._check(task)
                self.running[worker] = task
        assert len(self.running) == self.case.workers or self.schedule.waiting() == 0  # nobody idles while work waits

    def _check(self, task: Task) -> None:
        assert task not in self.running.values()
        assert task.block < self.schedule.solved_blocks + self.case.in_flight
        if task.kind == FORWARD:
            assert self.reached[task.number] >= task.block
        elif task.kind == COMPLETE:
            assert all((task.block, share) in self.sums for share in range(self.case.shares))
        else:
            assert task.block in self.grams
            assert self.case.firsts[task.number] <= task.block
            assert (task.block, task.number, task.piece) not in self.solved

    def finish(self, worker: int) -> None:
        task = self.running.pop(worker)
        self.finished.append(task)
        if task.kind == FORWARD:
            self.reached[task.number] = max(self.reached[task.number], task.block + 1)
            if task.record:
                self.sums[task.block, task.number] = worker
        elif task.kind == COMPLETE:
            self.grams[task.block] = worker
        else:
            self.solved.add((task.block, task.number, task.piece))
        self.schedule.done(task)

    def lose_data(self, worker: int) -> None:
        """A node with all that its worker has summed."""
        if worker in self.running:
            self.schedule.failed(self.running.pop(worker))
        self.schedule.lose_worker(worker)
        for block in self.schedule.open_blocks():
            self.schedule.lose_results(block, {worker})
        self.sums = {where: owner for where, owner in self.sums.items() if owner != worker}
        self.grams = {block: owner for block, owner in self.grams.items() if owner != worker}


@settings(deadline=None, max_examples=150)
@given(cases(), st.data())
def test_every_part_solves_every_block_that_it_lacks(case: Case, data: st.DataObject) -> None:
    found, troubles = Pass(case), 0
    while not found.schedule.finished:
        found.give_out()
        assert found.running, "nothing runs, and the pass is not over"
        worker = data.draw(st.sampled_from(sorted(found.running)))
        trouble = data.draw(st.sampled_from(["", "", "", "worker", "node"])) if troubles < 6 else ""
        troubles += bool(trouble)
        if trouble == "":
            found.finish(worker)
        elif trouble == "worker":
            found.schedule.failed(found.running.pop(worker))
            found.schedule.lose_worker(worker)
        else:
            found.lose_data(worker)
    assert found.solved == {
        (block, part, piece)
        for part, first in enumerate(case.firsts)
        for block in range(first, case.blocks)
        for piece in range(case.pieces[part][block])
    }
    if not troubles:
        assert len(found.finished) == len(set(found.finished))


def test_the_forward_pass_goes_on_while_blocks_are_solved() -> None:
    """Two workers: once one of them has a solve, the other takes the next block's share, whosever it was."""
    schedule = Schedule([[1] * 4], 2, [0], 0, 2)
    first = [schedule.next("a"), schedule.next("b")]
    assert first == [Task(FORWARD, 0, 0), Task(FORWARD, 0, 1)]
    for task in first:
        assert task is not None
        schedule.done(task)
    assert schedule.next("a") == Task(COMPLETE, 0)
    assert schedule.next("b") == Task(FORWARD, 1, 1)
    schedule.done(Task(COMPLETE, 0))
    assert schedule.next("a") == Task(SOLVE, 0)
    schedule.done(Task(FORWARD, 1, 1))
    assert schedule.next("b") == Task(FORWARD, 1, 0)
    schedule.done(Task(FORWARD, 1, 0))
    assert schedule.next("b") == Task(COMPLETE, 1)
    schedule.done(Task(COMPLETE, 1))
    assert schedule.next("b") == Task(SOLVE, 1)
    assert schedule.next("c") is None  # two blocks are under way: the third waits for the first
    schedule.done(Task(SOLVE, 0))
    assert schedule.next("c") == Task(FORWARD, 2, 0)


def in_order(schedule: Schedule, *expected: Task) -> None:
    for task in expected:
        assert schedule.next("a") == task
        schedule.done(task)


def test_sums_that_are_lost_beside_their_last_solve_hold_nobody_up() -> None:
    """The sums are made again, though nothing is left to solve with them: only then is the block over."""
    schedule = Schedule([[1, 1]], 1, [0], 0, 1)
    in_order(schedule, Task(FORWARD, 0), Task(COMPLETE, 0))
    assert schedule.next("b") == Task(SOLVE, 0)
    schedule.lose_results(0, {"a"})
    schedule.done(Task(SOLVE, 0))
    in_order(schedule, Task(FORWARD, 0), Task(COMPLETE, 0))
    in_order(schedule, Task(FORWARD, 1), Task(COMPLETE, 1), Task(SOLVE, 1))
    assert schedule.finished


def test_a_solved_block_that_waits_for_an_earlier_one_is_not_made_again() -> None:
    schedule = Schedule([[1, 1]], 1, [0], 0, 2)
    in_order(schedule, Task(FORWARD, 0), Task(COMPLETE, 0))
    assert schedule.next("b") == Task(SOLVE, 0)
    in_order(schedule, Task(FORWARD, 1), Task(COMPLETE, 1), Task(SOLVE, 1))
    schedule.lose_results(1, {"a"})
    assert schedule.next("a") is None
    schedule.done(Task(SOLVE, 0))
    assert schedule.finished


def test_a_part_that_leaves_holds_nobody_up() -> None:
    schedule = Schedule([[1], [2]], 1, [0, 0], 0, 1)
    for expected in (Task(FORWARD, 0), Task(COMPLETE, 0), Task(SOLVE, 0, 0)):
        assert schedule.next("a") == expected
        schedule.done(expected)
    schedule.leave(1)
    assert schedule.finished


@pytest.mark.parametrize("owner_is_free", [True, False])
def test_a_share_stays_with_its_worker_unless_that_one_is_busy(owner_is_free: bool) -> None:
    schedule = Schedule([[1] * 3], 2, [2], 0, 3)
    a, b = schedule.next("a"), schedule.next("b")
    assert a is not None
    assert b is not None
    assert not a.record
    schedule.done(a)
    schedule.done(b)
    if owner_is_free:
        assert schedule.next("b") == Task(FORWARD, 1, b.number, record=False)
    assert schedule.next("a") == Task(FORWARD, 1, a.number, record=False)
