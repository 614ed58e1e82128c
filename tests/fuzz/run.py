"""Feeds a reader with mutated input and watches it: time, memory, exceptions, and which files it opens.

In: a target, a number of inputs, a seed. Out: a Report; findings come with the smallest input that still shows them.
`fuzz` does it in this process, and leaves a hook behind that looks at every file opened. `fuzz_apart` does it in a
process of its own, with a limit on memory, and survives its death.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quantize.errors import QuantizeError
from tests.fuzz.mutate import Mutator
from tests.fuzz.targets import TARGETS, Kind, Read, Target

SECONDS = 5.0
"""Processor time that one input may take."""
MEMORY_BYTES = 256 << 20
"""Address space that a process may take beyond what it has before the first input."""
STUCK_SECONDS = 30.0
IN_MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
SHRINK_RUNS = 400
CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "shutil.rmtree", "subprocess.Popen", "os.system",
           "os.exec", "os.posix_spawn", "socket.connect", "socket.getaddrinfo"}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """Something that no input may do: what, where, how often, and an input that does it."""

    what: str
    times: int
    data: bytes


@dataclass
class Report:
    """One run. outcomes: how often each kind of end was met, errors by their words without what differs."""

    target: str
    inputs: int = 0
    seconds: float = 0.0
    slowest_seconds: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def read(self) -> int:
        """Inputs that were read."""
        return sum(times for outcome, times in self.outcomes.items() if outcome.startswith("read"))

    @property
    def refused(self) -> int:
        """Inputs that ended with an error of ours."""
        return self.inputs - self.read - sum(item.times for item in self.findings)


class TookTooLong(BaseException):
    """Raised by the timer; no reader catches it."""


class LeftItsFolder(BaseException):
    """Raised where a reader opens what is not its own."""


class _Watch:
    """Where the reader that runs just now may open files; None while none runs."""

    folder: Path | None = None
    installed = False

    @classmethod
    def hook(cls, event: str, args: tuple[Any, ...]) -> None:
        if cls.folder is None or (event != "open" and event not in CHANGES):
            return
        if event != "open":
            raise LeftItsFolder(event)
        if not isinstance(args[0], str | bytes | os.PathLike):
            return
        with contextlib.suppress(ValueError):
            path = Path(os.path.realpath(os.fsdecode(args[0])))
            if not path.is_relative_to(cls.folder) and not any(path.is_relative_to(item) for item in _IMPORTED):
                cls.folder = None
                raise LeftItsFolder(f"opened {path}")

    @classmethod
    @contextlib.contextmanager
    def on(cls, folder: Path | None) -> Iterator[None]:
        if not cls.installed:
            sys.addaudithook(cls.hook)
            cls.installed = True
        cls.folder = folder
        try:
            yield
        finally:
            cls.folder = None


_IMPORTED = [Path(item).resolve() for item in sys.path if item] + [Path(sys.prefix).resolve(), Path(sys.base_prefix)]


def fuzz(
    name: str, inputs: int, seed: str, *, target: Target | None = None, seconds: float = SECONDS,
    started: Callable[[bytes], object] = len, base: Path | None = None,
) -> Report:  # fmt: skip
    """Read `inputs` mutated inputs in this process. started: told each before it is read. base: for scratch files."""
    target = target or TARGETS[name]
    report, found = Report(name), {}
    with tempfile.TemporaryDirectory(dir=base or IN_MEMORY) as scratch, _timer(), _elsewhere(Path(scratch)) as folder:
        valid = target.seeds(Path(scratch))
        read = target.prepare(folder)
        for data in valid:
            read(data)
        watched = None if target.names_paths else folder.resolve()
        mutator, begun = Mutator(valid, target.form, f"{seed}/{name}"), time.perf_counter()
        for _ in range(inputs):
            data = mutator.next()
            started(data)
            before = time.process_time()
            outcome, bad = _outcome(read, data, watched, seconds)
            report.slowest_seconds = max(report.slowest_seconds, time.process_time() - before)
            if bad:
                found.setdefault(outcome, [0, data])[0] += 1
            else:
                if outcome not in report.outcomes:
                    mutator.keep(data)
                report.outcomes[outcome] = report.outcomes.get(outcome, 0) + 1
        report.inputs, report.seconds = inputs, time.perf_counter() - begun
        for outcome, (times, data) in found.items():
            small = shrunk(data, lambda item, same=outcome: _outcome(read, item, watched, seconds) == (same, True))
            report.findings.append(Finding(outcome, times, small))
    return report


def fuzz_apart(name: str, inputs: int, seed: str, *, target: Target | None = None, seconds: float = SECONDS) -> Report:
    """The same in a process of its own, with a limit on memory. If it dies or hangs, that is a finding too."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as scratch:
        base, last = Path(scratch), Path(scratch) / "last"
        last.touch()
        process = context.Process(target=_child, args=(theirs, name, inputs, seed, target, seconds, base))
        process.start()
        theirs.close()
        seen, report = b"", None
        while report is None:
            if ours.poll(STUCK_SECONDS):
                with contextlib.suppress(EOFError):
                    report = ours.recv()
                break
            now = last.read_bytes()
            if now == seen:
                break
            seen = now
        if report is None:
            process.kill()
        process.join()
        if report is None:
            what = "stuck" if process.exitcode == -signal.SIGKILL else f"the process died ({process.exitcode})"
            report = Report(name, inputs, findings=[Finding(what, 1, last.read_bytes())])
    return report


def _child(
    pipe: Connection, name: str, inputs: int, seed: str, target: Target | None, seconds: float, base: Path
) -> None:
    with (base / "last").open("r+b", buffering=0) as file:

        def started(data: bytes) -> None:
            os.pwrite(file.fileno(), data, 0)
            os.ftruncate(file.fileno(), len(data))

        limit_memory(MEMORY_BYTES)
        pipe.send(fuzz(name, inputs, seed, target=target, seconds=seconds, started=started, base=base))


def limit_memory(more_bytes: int) -> None:
    """Let this process have so much more address space than it has now."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def shrunk(data: bytes, shows: Callable[[bytes], bool]) -> bytes:
    """A smaller input that shows the same: ever smaller pieces are left out, while it does."""
    runs, size = 0, max(1, len(data) // 2)
    while runs < SHRINK_RUNS:
        at, before = 0, len(data)
        while at < len(data) and runs < SHRINK_RUNS:
            shorter = data[:at] + data[at + size :]
            runs += 1
            if shows(shorter):
                data = shorter
            else:
                at += size
        if size == 1 and len(data) == before:
            break
        size = max(1, size // 2)
    return data


def _outcome(read: Read, data: bytes, watched: Path | None, seconds: float) -> tuple[str, bool]:
    """How reading ends, and whether it may not end so."""
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        with _Watch.on(watched):
            result = read(data)
    except QuantizeError as exc:
        return f"{type(exc).__name__} at {_place(exc)}{_why(exc.__cause__)}", not _is_printable(str(exc))
    except (Exception, TookTooLong, LeftItsFolder) as exc:  # noqa: BLE001 - whatever it is, it is what we look for
        return f"{type(exc).__name__}: {_words(str(exc))} at {_place(exc)}", True
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return f"read: {result}" if isinstance(result, Kind) else "read", False


def _words(message: str) -> str:
    """A message without what differs from input to input."""
    message = re.sub(r"\S*/", "", message.partition("\n")[0][:300])
    message = re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`|\[.*\]", "…", message)
    return re.sub(r"[\d,.]+|found .*", "#", message)[:100]


def _is_printable(text: str) -> bool:
    return all(item.isprintable() or item in "\n\t " for item in text) or not re.search(
        r"[\0-\x08\x1b\ud800-\udfff]", text
    )


def _why(cause: BaseException | None) -> str:
    """What made a reader refuse, where that was another's exception: pydantic's word for it, or its kind and place."""
    if isinstance(cause, ValidationError):
        first = cause.errors(include_url=False, include_context=False, include_input=False)[0]
        return f", {cause.title}: {first['type']}, {_words(first['msg'])}"
    return "" if cause is None else f", {type(cause).__name__} at {_place(cause, OURS | OTHERS)}"


OURS, OTHERS = {"quantize"}, {"yaml", "json", "pydantic"}


def _place(exc: BaseException, packages: Set[str] = frozenset(OURS)) -> str:
    """The innermost line of these packages that an exception went through."""
    found = "no code of ours"
    for frame, line in traceback.walk_tb(exc.__traceback__):
        path = Path(frame.f_code.co_filename)
        if packages & set(path.parts):
            found = f"{path.name}:{line}"
    return found


@contextlib.contextmanager
def _timer() -> Iterator[None]:
    def ring(_number: int, _frame: object) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGPROF, ring)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _elsewhere(scratch: Path) -> Iterator[Path]:
    """A folder in a folder, that relative paths start from."""
    folder, before = scratch / "inner" / "model", Path.cwd()
    folder.mkdir(parents=True)
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


def as_data(report: Report) -> dict[str, Any]:
    """A report as JSON data."""
    data = dataclasses.asdict(report)
    data["findings"] = [{"what": item.what, "times": item.times, "input": repr(item.data)} for item in report.findings]
    return {**json.loads(json.dumps(data)), "read": report.read, "refused": report.refused}
