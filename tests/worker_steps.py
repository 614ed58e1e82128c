"""Steps that tests run in worker processes: they must be importable there."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from quantize.errors import PlanError, VerifyError
from quantize.events import Reporter, note, progress


def add(reporter: Reporter, first: int, second: int, *, times: int = 1) -> int:
    """Return a plain result."""
    return (first + second) * times


def count(reporter: Reporter, to: int) -> str:
    """Send many events, then return."""
    for number in range(to):
        progress(reporter, "v", "counting", number, to)
    note(reporter, "v", "counted")
    return "done"


def refuse(reporter: Reporter) -> None:
    """Raise an error of ours."""
    raise PlanError("it can't be done", hint="do something else")


def crash(reporter: Reporter) -> None:
    """Raise somebody else's error."""
    raise ZeroDivisionError("nothing to divide by")


def exhaust(reporter: Reporter) -> None:
    """Run out of memory, as Python says it."""
    raise MemoryError


def take(reporter: Reporter, mib: int) -> None:
    """Ask for more memory than a limit allows, as `ulimit -v` sets it."""
    import resource

    import numpy as np

    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20), now + (64 << 20)))
    np.ones(mib << 17)


def refused_by_allocator(reporter: Reporter) -> None:
    """An artifact does not load, because there is no memory for it."""
    try:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 9 bytes")
    except RuntimeError as exc:
        raise VerifyError("it does not load") from exc


def bad_alloc(reporter: Reporter) -> None:
    """Die as C++ does when memory runs out."""
    os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n")
    os.abort()


def abort(reporter: Reporter) -> None:
    """Die as a C library does, with last words on stderr."""
    os.write(2, b"assertion failed in some library\n")
    os.abort()


def kill(reporter: Reporter, mib: int) -> None:
    """Take memory, be seen with it, and be killed as the kernel does."""
    data = bytearray(mib << 20)
    data[:: 1 << 12] = b"x" * len(data[:: 1 << 12])
    time.sleep(0.6)
    os.kill(os.getpid(), signal.SIGKILL)


def leave(reporter: Reporter) -> None:
    """End without an answer."""
    os._exit(7)


def talk(reporter: Reporter) -> int:
    """Write to stdout from Python, from the system and from C."""
    print("python talks")
    sys.stderr.write("python complains\n")
    os.write(1, b"the system talks\n")
    libc = ctypes.CDLL(None)
    libc.puts(b"a C library talks")
    libc.fflush(None)
    return 1


def unpicklable(reporter: Reporter) -> object:
    """Return what can't be sent."""
    return lambda: None


def wait(reporter: Reporter, pid_file: Path) -> None:
    """Say who we are, then wait for long."""
    pid_file.write_text(str(os.getpid()))
    time.sleep(120)


def main_name(reporter: Reporter) -> str:
    """The file of the child's __main__: not the caller's script."""
    return str(getattr(sys.modules["__main__"], "__file__", None))


def whose_child(reporter: Reporter) -> tuple[int, str | None, bool]:
    """The parent's process number, a variable of the environment, whether torch was loaded before the step began."""
    return os.getppid(), os.environ.get("QUANTIZE_TEST_VARIABLE"), "torch" in sys.modules


def spoil_torch(reporter: Reporter) -> bool:
    """Whether an earlier step has changed the library; then change it."""
    import torch

    was = hasattr(torch, "changed_by_a_step")
    torch.changed_by_a_step = True  # type: ignore[attr-defined]
    return was


def multiply_on_threads(reporter: Reporter) -> tuple[float, float]:
    """A product that takes all threads that there are, and the same on one."""
    import torch

    torch.set_num_threads(2)
    left = torch.arange(512.0 * 512).reshape(512, 512) % 7
    many = float((left @ left).sum())
    torch.set_num_threads(1)
    return many, float((left @ left).sum())
