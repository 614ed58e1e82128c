"""Independent pieces of tensor work, each on one thread of its own.

In: functions without arguments. Out: their results, in order. One thread a piece keeps LAPACK's and BLAS's bits the
same whatever the number of cores, and spares the small operations of a solver the meeting of threads after each one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def on_threads(tasks: Sequence[Callable[[], Result]], threads: int) -> list[Result]:
    """Run the tasks, at most `threads` at a time; torch and its libraries use one thread in each.

    Raises whatever the first failing task (in order) raises.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # MKL's setting is the process's, OpenMP's the thread's: so here, and in each thread
    try:
        if threads == 1 or len(tasks) < 2:
            return [task() for task in tasks]
        with ThreadPoolExecutor(min(threads, len(tasks)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda task: task(), tasks))
    finally:
        torch.set_num_threads(before)
