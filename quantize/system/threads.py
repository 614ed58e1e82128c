"""Independent pieces of tensor work, each on one thread of its own.

In: functions without arguments. Out: their results, in order. One thread a piece keeps LAPACK's and BLAS's bits the
same whatever the number of cores, and spares the small operations of a solver the meeting of threads after each one.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")
Function = TypeVar("Function", bound=Callable[..., Any])


def threads_on(device: torch.device) -> int:
    """How many tasks a device may be given at once: torch's threads on a CPU; a GPU takes one after the other."""
    import torch

    return torch.get_num_threads() if device.type == "cpu" else 1


def on_threads(tasks: Sequence[Callable[[], Result]], threads: int) -> list[Result]:
    """Run the tasks, at most `threads` at a time; torch and its libraries use one thread in each.

    Raises whatever the first failing task (in order) raises.
    """
    with _one_thread_each(threads, len(tasks)) as pool:
        return [task() for task in tasks] if pool is None else list(pool.map(lambda task: task(), tasks))


def in_stages(stages: Sequence[Callable[[], Sequence[Callable[[], Result]]]], threads: int) -> list[list[Result]]:
    """Run each stage, and then the tasks that it returns, as `on_threads` does; one list of results for each stage.

    A stage's first task follows it on its thread, so that a long one put first is not behind all the short ones.
    """
    with _one_thread_each(threads, 2 * len(stages)) as pool:
        if pool is None:
            return [[task() for task in stage()] for stage in stages]

        def begin(stage: Callable[[], Sequence[Callable[[], Result]]]) -> list[Callable[[], Result]]:
            first, *others = stage()
            waiting = [pool.submit(task).result for task in others]
            found = first()
            return [lambda: found, *waiting]

        return [[result() for result in results] for results in pool.map(begin, stages)]


@contextmanager
def split_threads(parts: int) -> Iterator[list[ThreadPoolExecutor]]:
    """As many executors of one thread each as there are parts, in which torch uses that part of its threads; none where
    it has fewer threads than parts.
    """
    import torch

    before = torch.get_num_threads()
    if parts == 1 or before < parts:
        yield []
        return
    torch.set_num_threads(before // parts)
    try:
        with ExitStack() as open_pools:
            pools = [
                ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(before // parts,))
                for _ in range(parts)
            ]
            yield [open_pools.enter_context(pool) for pool in pools]
    finally:
        torch.set_num_threads(before)


def in_turn(tasks: Iterable[Callable[[], Result]], pools: Sequence[ThreadPoolExecutor]) -> Iterator[Result]:
    """Deal tasks out to the executors in turn; results in order. A few tasks are under way at a time."""
    if not pools:
        yield from (task() for task in tasks)
        return
    waiting: deque[Future[Result]] = deque()
    for number, task in enumerate(tasks):
        waiting.append(pools[number % len(pools)].submit(task))
        if len(waiting) > 2 * len(pools):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def _one_thread_each(threads: int, tasks: int) -> Iterator[ThreadPoolExecutor | None]:
    """A pool in which torch and its libraries use one thread in each; None where one thread is enough."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # MKL's setting is the process's, OpenMP's the thread's: so here, and in each thread
    try:
        if threads == 1 or tasks < 2:
            yield None
            return
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


@cache
def without_gil(function: Function) -> Function:
    """A loop of small tensor operations, as TorchScript: it gives the same bits, and leaves Python's lock alone.

    Two threads that each run such a loop in Python take four times as long as one: each operation is so short that they
    wait for the lock most of the time. torch calls TorchScript deprecated and has nothing else that runs a loop without
    Python; where it is gone, the function itself is returned. On a GPU the function itself runs too: there TorchScript
    fuses operations from the second call on, and a fused kernel leaves out conversions to float16 (pytorch#74534), so
    that bits would depend on which call was the first.
    """
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            scripted = torch.jit.script(function)
        except (AttributeError, RuntimeError):
            return function

    @wraps(function)
    def run(*arguments: Any) -> Any:
        on_gpu = any(isinstance(item, torch.Tensor) and item.is_cuda for item in arguments)
        return function(*arguments) if on_gpu else scripted(*arguments)

    return cast(Function, run)
