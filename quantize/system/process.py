"""Runs one long step in a process of its own, so that its crash is an error with a name and not the end of the run.

In: a picklable function, its arguments, the name of the step. Out: its result, its events, or its QuantizeError;
WorkerDied if the process was killed or crashed, in the words of deaths.py.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, TypeVar

from quantize.errors import (
    LOWER_MEMORY,
    BuildError,
    DiskFullError,
    OutOfMemory,
    QuantizeError,
    WorkerDied,
    disk_full,
    first_line,
    is_disk_full,
    is_out_of_memory,
)
from quantize.events import Event, Reporter, warn
from quantize.system.deaths import TAIL_BYTES, evidence, explain, oom_kills
from quantize.system.gpus import number_by_address
from quantize.system.processor import settle_products
from quantize.system.sizes import mebibytes_text
from quantize.system.warm import start

P = ParamSpec("P")
Result = TypeVar("Result")
POLL_SECONDS = 0.2
_starting = threading.Lock()


class PipeReporter:
    """Sends events to the parent process."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def emit(self, event: Event) -> None:
        """Send one event; a parent that is gone is noticed by the watchdog."""
        with self._lock, contextlib.suppress(OSError):
            self._pipe.send(("event", event))

    def stop_asked(self) -> bool:
        """Whether the parent has asked the step to end."""
        with contextlib.suppress(OSError, EOFError):
            return self._pipe.poll()
        return False


def stop_asked(reporter: Reporter) -> bool:
    """Whether a step that was run with `stops` should end now, because the user has pressed Ctrl-C once."""
    return isinstance(reporter, PipeReporter) and reporter.stop_asked()


def run_step(
    step: str, reporter: Reporter, function: Callable[..., Result], *args: Any, stops: bool = False,
    most_seconds: float = math.inf, **kwargs: Any,
) -> Result:  # fmt: skip
    """Call `function(reporter, *args, **kwargs)` in a fresh process and return what it returns.

    stops: the function looks at `stop_asked` now and then and raises Stopped; the first Ctrl-C asks it to, a second one
    ends it at once, as the first does where `stops` is False. most_seconds: what takes longer is ended.

    Raises: the function's own QuantizeError; DiskFullError, OutOfMemory or BuildError for any other exception, with its
    traceback kept for -v; WorkerDied if the process ended without an answer, or took too long.
    """
    parent, child = multiprocessing.Pipe()
    with _log_file() as log, _interrupts(parent, reporter, stops):
        os.set_inheritable(log.fileno(), True)
        path = f"/proc/{os.getpid()}/fd/{log.fileno()}"
        work = pickle.dumps((function, args, kwargs))
        kills = oom_kills()
        with _starting, _plain_main():
            process = start(_child, (child, path, work, dict(os.environ)))
        child.close()
        peak, end = 0, time.monotonic() + most_seconds
        try:
            while True:
                while not parent.poll(POLL_SECONDS):
                    peak = max(peak, peak_memory_bytes(process.pid))
                    if time.monotonic() > end:
                        raise _too_long(step, most_seconds)
                kind, payload = parent.recv()
                if kind == "event":
                    reporter.emit(payload)
                    continue
                process.join()
                result: Result = _answer(step, kind, payload, peak)
                return result
        except EOFError:
            process.join()
            wrote = _tail(log)
            raise _death(step, process.exitcode, peak, wrote, kills) from RuntimeError(evidence(wrote))
        finally:
            if process.is_alive():
                process.kill()
                process.join()
            parent.close()


def _answer(step: str, kind: str, payload: Any, peak: int) -> Any:
    if kind == "result":
        return payload
    if kind == "error":
        raise payload
    error = BuildError(f"{step}: {payload[0]}", hint="run again with -v for the traceback")
    if kind == "memory":
        error = OutOfMemory(f"{step}: out of memory{_had(peak)}", hint=LOWER_MEMORY)
    elif kind == "disk":
        error = disk_full(RuntimeError(payload[0]), step)
    error.__cause__ = RuntimeError(payload[1])
    raise error


@contextlib.contextmanager
def _interrupts(pipe: Connection, reporter: Reporter, stops: bool) -> Iterator[None]:
    """The first Ctrl-C becomes a message to the step; after it, Ctrl-C is again what it was before."""
    if not stops or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(_signal: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        warn(reporter, "", "stopping when this block is done; Ctrl-C again stops at once")
        with contextlib.suppress(OSError):
            pipe.send("stop")

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def settle_libraries() -> None:
    """Set what numerical libraries read from the environment; call before the first of them loads."""
    spin_briefly()
    settle_products()
    number_by_address()


def spin_briefly() -> None:
    """Have idle OpenMP threads spin for some microseconds and then sleep; call before a library that reads it loads.

    Long spins made a calibration pass eight times slower on a busy machine, none at all three times slower on an idle
    one. What the user has set stands.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _child(pipe: Connection, log: str, work: bytes, environment: dict[str, str]) -> None:
    """work: the function and its arguments, pickled: to load it imports their modules, and with them torch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and kills us if it must
    _take(environment)
    settle_libraries()
    _redirect_output(log)
    faulthandler.enable()  # a crash leaves where it was, and deaths.py reads which library that is
    threading.Thread(target=_die_with_parent, daemon=True).start()
    pipe.send(_outcome(work, PipeReporter(pipe)))
    pipe.close()


def _outcome(work: bytes, reporter: Reporter) -> tuple[str, Any]:
    """What to tell the parent: ("result", it), ("error", one of ours), or what kind of failure, with its traceback."""
    try:
        function, args, kwargs = pickle.loads(work)
        return "result", function(reporter, *args, **kwargs)
    except QuantizeError as exc:
        if not isinstance(exc, DiskFullError) and is_out_of_memory(exc):
            return "memory", (first_line(exc), traceback.format_exc())
        return "error", exc
    except BaseException as exc:  # noqa: BLE001 - everything must reach the parent, which gives it a name
        kind = "memory" if is_out_of_memory(exc) else "disk" if is_disk_full(exc) else "crash"
        return kind, (f"{type(exc).__name__}: {first_line(exc)}", traceback.format_exc())


def _log_file() -> BinaryIO:
    """A file in memory, where the system has them: a full disk must not be what breaks a step."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("quantize-step"), "w+b")
    return tempfile.TemporaryFile(prefix="quantize-step-")


def _redirect_output(log: str) -> None:
    """Send what libraries print, C or Python, to the step's log: stdout belongs to results."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        target = os.open(log, os.O_WRONLY | os.O_APPEND)
    except OSError:
        target = os.open(os.devnull, os.O_WRONLY)
    os.dup2(target, 1)
    os.dup2(target, 2)


def _take(environment: dict[str, str]) -> None:
    """The environment of whoever asks for the step, which may have changed since the process copied was started."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def _die_with_parent() -> None:
    """A step whose parent was killed must not go on writing into a folder that nobody owns any more."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _plain_main() -> Iterator[None]:
    """Keep multiprocessing from running the caller's script again in the child: steps never live in it."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    main.__spec__ = None
    if file is not None:
        del main.__file__
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def peak_memory_bytes(pid: int | None) -> int:
    """Peak resident memory of a process so far, in bytes; 0 where the system does not tell.

    Not ru_maxrss: that one is inherited from the process that started it.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _tail(log: Any) -> str:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - TAIL_BYTES))
    return str(log.read().decode("utf-8", "replace"))


def _had(peak: int) -> str:
    return f"; it had {mebibytes_text(peak)} of memory" if peak else ""


def _too_long(step: str, seconds: float) -> WorkerDied:
    reason = f"the process did not end within {seconds:g} s and was ended"
    return WorkerDied(f"{step}: {reason}", reason=reason, hint="try it again when the machine is less busy")


def _death(step: str, exitcode: int | None, peak: int, wrote: str, kills: int | None) -> BuildError:
    """The error for a process that ended without an answer. kills: what `oom_kills` said as it began."""
    if is_out_of_memory(RuntimeError(" ".join(evidence(wrote).split()))):
        return OutOfMemory(f"{step}: out of memory{_had(peak)}", hint=LOWER_MEMORY)
    if exitcode is not None and exitcode < 0:
        death = explain(exitcode, wrote, kills)
        reason = f"the process was {death.reason}"
        hint = f"{death.remedy}\n  -v shows where it was" if death.is_crash else death.remedy
        had = _had(peak) if death.signal == "SIGKILL" else ""
        return WorkerDied(f"{step}: {reason}{had}", reason=reason, hint=hint)
    reason = f"the process ended without an answer (exit {exitcode})"
    return WorkerDied(f"{step}: {reason}{_had(peak)}", reason=reason, hint="run again with -v for its last output")
