"""Steps are copies of one process that has loaded the libraries, where that is the same as loading them anew."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from quantize.errors import QuantizeError
from quantize.events import SilentReporter
from quantize.system import warm
from quantize.system.process import run_step
from tests import worker_steps

QUIET = SilentReporter()
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="steps are fresh processes elsewhere")


@pytest.fixture(autouse=True)
def _started_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this test were the first to run a step in these surroundings."""
    monkeypatch.setattr(warm, "_as_started", warm._surroundings())


def whose() -> tuple[int, str | None, bool]:
    return run_step("looking", QUIET, worker_steps.whose_child)


def test_steps_are_copies_of_one_process_with_libraries_loaded() -> None:
    (first, _, loaded), (second, _, _) = whose(), whose()
    assert first == second != os.getpid()
    assert loaded


def test_a_copy_has_the_environment_of_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    whose()
    monkeypatch.setenv("QUANTIZE_TEST_VARIABLE", "set since")
    parent, value, _ = whose()
    assert (parent != os.getpid(), value) == (True, "set since")
    monkeypatch.delenv("QUANTIZE_TEST_VARIABLE")
    assert whose()[1] is None


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HOME", "LLAMA_CPP_LIB_PATH"])
def test_what_libraries_read_when_they_load_asks_for_a_fresh_process(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "3")
    assert whose()[0] == os.getpid()


def test_other_places_of_modules_ask_for_a_fresh_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert whose()[0] == os.getpid()


def test_what_a_step_does_to_a_library_stays_in_it() -> None:
    assert [run_step("changing", QUIET, worker_steps.spoil_torch) for _ in range(2)] == [False, False]


def test_a_copy_computes_on_several_threads() -> None:
    many, one = run_step("multiplying", QUIET, worker_steps.multiply_on_threads)
    assert many == one > 0


def test_steps_go_on_when_what_is_copied_has_died() -> None:
    first = whose()[0]
    os.kill(first, signal.SIGKILL)
    assert whose()[0] not in (first, 1)
    assert run_step("adding", QUIET, worker_steps.add, 1, second=2) == 3


def test_a_crash_of_a_copy_is_named_as_before() -> None:
    with pytest.raises(QuantizeError, match="the process was ended by SIGABRT"):
        run_step("crashing", QUIET, worker_steps.abort)
    assert whose()[0] != os.getpid()
