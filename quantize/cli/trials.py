"""One tiny thing in every engine that is installed, each in a process of its own: what `quantize doctor` runs.

In: the probes that formats name. Out: a Trial for each engine: what ran, or what it died of and the line that repairs
it. The probes run in workers; nothing heavy is imported here.
"""

from __future__ import annotations

import gc
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from quantize.cli.requirements import version_of
from quantize.errors import BuildError, QuantizeError, VerifyError, WorkerDied
from quantize.events import Reporter, SilentReporter
from quantize.runtimes.probe import Probe
from quantize.system.deaths import LIBRARIES, reinstall_line
from quantize.system.machine import usable_cores
from quantize.system.process import run_step

MOST_SECONDS = 300  # of one engine: what takes longer hangs


class TrialState(StrEnum):
    """What became of a trial. DIED: its process, of a signal."""

    WORKS = "works"
    DIED = "died"
    FAILS = "fails"


@dataclass(frozen=True)
class Trial:
    """One engine. ran: what it did; problem, repair: where it did not. evidence: what the process wrote last."""

    engine: str
    package: str
    version: str
    state: TrialState
    seconds: float
    ran: str | None = None
    problem: str | None = None
    repair: str | None = None
    evidence: str | None = None


def try_engines(probes: Sequence[Probe]) -> tuple[Trial, ...]:
    """Run something in each engine that is installed, as many at once as there are cores, the last one first: what a
    format needs beside an engine that is tried before is slower than that.
    """
    there = [probe for probe in probes if version_of(probe.package)]
    waiting: queue.SimpleQueue[Probe] = queue.SimpleQueue()
    for probe in reversed(there):
        waiting.put(probe)
    found: dict[str, Trial] = {}

    def work() -> None:
        while not waiting.empty():
            try:
                probe = waiting.get_nowait()
            except queue.Empty:
                return
            found[probe.package] = try_engine(probe)

    # Daemons: Ctrl-C ends the command, and with it the processes, at once.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(usable_cores(), len(there)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tuple(found[probe.package] for probe in there)


def try_engine(probe: Probe) -> Trial:
    """Run one probe in a process of its own and say what came of it."""
    started = time.perf_counter()
    engine, package, version = probe.engine, probe.package, version_of(probe.package) or ""
    with tempfile.TemporaryDirectory(prefix="quantize-doctor-") as folder:
        try:
            ran = run_step(engine, SilentReporter(), _run, probe.run, folder, most_seconds=MOST_SECONDS)
            return Trial(engine, package, version, TrialState.WORKS, _since(started), ran)
        except QuantizeError as exc:
            state = TrialState.DIED if isinstance(exc, WorkerDied) else TrialState.FAILS
            problem = exc.message.removeprefix(f"{engine}: ")
            evidence = str(exc.__cause__) if exc.__cause__ else None
            return Trial(
                engine, package, version, state, _since(started),
                problem=problem, repair=_repair(exc, package), evidence=evidence,
            )  # fmt: skip


def _run(_reporter: Reporter, function: Callable[[], str], folder: str) -> str:
    """In the process of its own. Temporary files go where they are removed even if it dies."""
    gc.disable()  # what an import makes stays: an eighth of the time is saved
    tempfile.tempdir = folder
    return function()


def _repair(error: QuantizeError, package: str) -> str:
    """One line: what is installed and can't be imported, or computes nonsense, wants to be installed again."""
    if error.hint and (isinstance(error, WorkerDied) or not isinstance(error, BuildError | VerifyError)):
        return error.hint.partition("\n")[0]
    lines = [reinstall_line(library) for library in LIBRARIES if library.package == package]
    return f"reinstall it with: {(lines or [f'pip install --force-reinstall --no-cache-dir {package}'])[0]}"


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 2)
