"""A step in a process of its own: what comes back, and what its death looks like from here."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from quantize.errors import BuildError, OutOfMemory, PlanError, QuantizeError, WorkerDied
from quantize.events import EventKind, ListReporter, SilentReporter
from quantize.system.process import run_step
from tests import worker_steps

QUIET = SilentReporter()
ROOT = Path(__file__).parent.parent


def test_result_and_arguments() -> None:
    assert run_step("adding", QUIET, worker_steps.add, 1, second=2, times=10) == 30


def test_events_arrive_all_and_in_order() -> None:
    events = ListReporter()
    assert run_step("counting", events, worker_steps.count, 500) == "done"
    assert [event.done for event in events.events[:-1]] == list(range(500))
    assert (events.events[-1].kind, events.events[-1].text) == (EventKind.NOTE, "counted")


def test_our_own_errors_pass_with_their_hint() -> None:
    with pytest.raises(PlanError, match="it can't be done") as caught:
        run_step("refusing", QUIET, worker_steps.refuse)
    assert caught.value.hint == "do something else"
    assert caught.value.exit_code == 3


def test_other_errors_name_the_step_and_keep_their_traceback() -> None:
    with pytest.raises(BuildError, match="dividing: ZeroDivisionError: nothing to divide by") as caught:
        run_step("dividing", QUIET, worker_steps.crash)
    assert "worker_steps.py" in str(caught.value.__cause__)
    assert not isinstance(caught.value, WorkerDied)


@pytest.mark.parametrize(
    ("step", "arguments"),
    [("exhaust", ()), ("take", (512,)), ("refused_by_allocator", ()), ("bad_alloc", ())],
)
def test_out_of_memory_is_said_as_such(step: str, arguments: tuple[int, ...]) -> None:
    """Whoever says it, and however; also of an artifact that can't be looked at for it."""
    with pytest.raises(OutOfMemory, match="filling: out of memory") as caught:
        run_step("filling", QUIET, getattr(worker_steps, step), *arguments)
    assert "lower --memory-budget or --threads" in str(caught.value.hint)


def test_a_crash_names_step_signal_and_last_words() -> None:
    with pytest.raises(WorkerDied, match="crashing: the process was ended by SIGABRT: a library gave up") as caught:
        run_step("crashing", QUIET, worker_steps.abort)
    assert str(caught.value.hint).endswith("\n  -v shows where it was")
    shown = str(caught.value.__cause__)
    assert "assertion failed in some library" in shown
    assert re.search(r'worker_steps.py", line \d+ in abort', shown), "and where it was"


def test_a_kill_names_step_signal_and_memory() -> None:
    with pytest.raises(WorkerDied, match=r"filling: the process was ended by SIGKILL: .*; it had [\d,]+ MiB") as caught:
        run_step("filling", QUIET, worker_steps.kill, 200)
    mib = int(caught.value.message.rpartition("it had ")[2].split()[0].replace(",", ""))
    assert 200 <= mib < 600
    assert caught.value.reason in caught.value.message
    assert "it had" not in caught.value.reason, "the same for all that it hits"


def test_what_takes_too_long_is_ended(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerDied, match=r"waiting: the process did not end within 2 s and was ended"):
        run_step("waiting", QUIET, worker_steps.wait, tmp_path / "pid", most_seconds=2)
    assert time.monotonic() - started < 20
    if (tmp_path / "pid").exists():
        assert wait_until_gone(int((tmp_path / "pid").read_text()))


def test_steps_at_once_leave_the_main_module_as_it_was() -> None:
    main = sys.modules["__main__"]
    before = (main.__spec__, getattr(main, "__file__", None))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda number: run_step("adding", QUIET, worker_steps.add, number, 1), range(4)))
    assert (main.__spec__, getattr(main, "__file__", None)) == before


def test_an_end_without_an_answer() -> None:
    with pytest.raises(WorkerDied, match=r"leaving: the process ended without an answer \(exit 7\)"):
        run_step("leaving", QUIET, worker_steps.leave)


def test_an_answer_that_can_not_be_sent_is_an_error_not_a_hang() -> None:
    with pytest.raises(BuildError, match="returning: "):
        run_step("returning", QUIET, worker_steps.unpicklable)


def test_what_a_step_prints_stays_off_our_output(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_step("talking", QUIET, worker_steps.talk) == 1
    assert capfd.readouterr() == ("", "")


def test_errors_survive_pickling_whatever_their_kind() -> None:
    import pickle

    from quantize.errors import MissingExtraError

    for error in (PlanError("a", hint="b"), MissingExtraError("this", "hub"), WorkerDied("gone")):
        copy: QuantizeError = pickle.loads(pickle.dumps(error))
        assert (type(copy), copy.message, copy.hint, str(copy)) == (type(error), error.message, error.hint, str(error))


def start_parent(tmp_path: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A script without a main guard that runs a long step; returns it and the step's process id."""
    pid_file = tmp_path / "pid"
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import pathlib, sys
            sys.path.insert(0, {str(ROOT)!r})
            from quantize.events import SilentReporter
            from quantize.system.process import run_step
            from tests import worker_steps
            print("once", flush=True)
            run_step("waiting", SilentReporter(), worker_steps.wait, pathlib.Path({str(pid_file)!r}))
            """
        )
    )
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (pid_file.is_file() and pid_file.read_text()):
        assert time.monotonic() < deadline, "the step did not start"
        time.sleep(0.05)
    return parent, int(pid_file.read_text())


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_the_death_of_the_parent_ends_the_step(tmp_path: Path) -> None:
    parent, step = start_parent(tmp_path)
    os.kill(parent.pid, signal.SIGKILL)
    output, _ = parent.communicate(timeout=10)
    assert output == b"once\n", "the child must not run the caller's script again"
    assert wait_until_gone(step)


def test_an_interrupt_of_the_parent_ends_the_step(tmp_path: Path) -> None:
    parent, step = start_parent(tmp_path)
    os.kill(parent.pid, signal.SIGINT)
    _, errors = parent.communicate(timeout=10)
    assert b"KeyboardInterrupt" in errors
    assert wait_until_gone(step)


def test_the_reason_in_a_log_is_named_not_what_came_of_it() -> None:
    from quantize.runtimes.llama_cpp.quantize import _last_line

    log = "error loading model: mmap failed: Cannot allocate memory\nload_from_file: failed to load model\n"
    assert _last_line(log).endswith("Cannot allocate memory")
    assert _last_line("loading\nfailed to load: bad magic\nbye\n") == "failed to load: bad magic"
