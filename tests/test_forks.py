"""Copies of a process: each for itself, ended when it is too long, and told of when it dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from quantize.system.forks import CopyDied, ForkServer, receive

SETUP = "tests.fork_steps:set_up"


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    made = ForkServer(SETUP, b"hello")
    assert made.told() == b"hello"
    yield made
    made.close()


def ask(pipe: Connection, what: bytes) -> bytes:
    pipe.send_bytes(what)
    return receive(pipe)


def wait(check: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 10
    while not check():
        assert time.monotonic() < give_up, "it did not happen in time"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_each_copy_is_a_process_of_its_own(server: ForkServer) -> None:
    with server.open() as first, server.open() as second:
        assert ask(first, b"x" * 1_000_000) == b"x" * 1_000_000
        assert len({ask(first, b"pid"), ask(second, b"pid"), str(os.getpid()).encode()}) == 3
        assert ask(first, b"ppid") == ask(second, b"ppid")


def test_what_takes_too_long_is_ended_and_says_so(server: ForkServer) -> None:
    with server.open() as pipe, server.open() as other:
        started = time.monotonic()
        with pytest.raises(CopyDied) as caught:
            ask(pipe, b"hang")
        assert caught.value.is_time
        assert time.monotonic() - started < 10
        assert ask(other, b"still here") == b"still here"


def test_a_crash_is_told_and_ends_nobody_else(server: ForkServer) -> None:
    with server.open() as pipe, server.open() as other:
        with pytest.raises(CopyDied, match="SIGSEGV") as caught:
            ask(pipe, b"crash")
        assert not caught.value.is_time
        assert ask(other, b"pid")


def test_one_that_leaves_without_a_word(server: ForkServer) -> None:
    with server.open() as pipe:
        pipe.send_bytes(b"leave")
        with pytest.raises(EOFError):
            receive(pipe)


def test_memory_has_an_end(server: ForkServer) -> None:
    with server.open() as pipe:
        assert ask(pipe, b"memory") == b"none left"


def test_a_copy_that_nobody_waits_for_is_ended(server: ForkServer) -> None:
    pipe = server.open()
    pid = int(ask(pipe, b"pid"))
    pipe.send_bytes(b"sleep")
    pipe.close()
    wait(lambda: not is_alive(pid))


def test_a_process_that_was_killed_is_set_up_again() -> None:
    server = ForkServer(SETUP, b"")
    server.told()
    with server.open() as pipe:
        first = int(ask(pipe, b"ppid"))
    os.kill(first, signal.SIGKILL)
    wait(lambda: not is_alive(first))
    with server.open() as pipe:
        second = int(ask(pipe, b"ppid"))
        last = int(ask(pipe, b"pid"))
    assert first != second
    server.close()
    wait(lambda: not is_alive(second) and not is_alive(last))


def test_one_that_does_not_come_up_is_told() -> None:
    server = ForkServer("tests.fork_steps:broken", b"")
    with pytest.raises(EOFError):
        server.told()
    with pytest.raises((EOFError, OSError)):
        server.open()
    server.close()
