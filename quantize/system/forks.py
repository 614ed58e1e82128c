"""Copies of a process that is set up once: each does one piece of work that may crash, hang, or take all memory.

In: the name of a set-up function ("module:function") and the bytes that it is given. Out: a Connection to a fresh copy
for each `open`, served by what the set-up returned. A copy that is ended by a signal says by which in its last frame;
one whose other end is closed is ended. What a frame means is left to both ends; POSIX only.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

Serve = Callable[[Connection], None]
DIED = b"\0died "  # what a last frame begins with; then comes the number of the signal
END_SECONDS = 2.0
NICENESS = 5


class CopyDied(Exception):
    """A copy was ended by a signal: SIGPROF for its time, SIGSEGV or SIGABRT for a library that crashed."""

    def __init__(self, number: int) -> None:
        self.is_time = number == signal.SIGPROF
        super().__init__(signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}")


class ForkServer:
    """Keeps the process that copies are made of running. For several threads at once."""

    def __init__(self, setup: str, options: bytes, environment: Mapping[str, str] | None = None) -> None:
        self._setup, self._options = setup, options
        self._environment = {**os.environ, **(environment or {})}
        self._lock = threading.Lock()
        self._launch()

    def _launch(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            process = self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), self._setup], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=self._environment,
            )  # fmt: skip
        self._end = weakref.finalize(self, _end, process, self._control)
        with _borrowed(self._control) as pipe, contextlib.suppress(OSError):
            pipe.send_bytes(self._options)  # one that is gone already is noticed when it is asked

    def told(self) -> bytes:
        """Wait until the process is set up: what the set-up function has to tell. Raises EOFError: it ended."""
        with self._lock, _borrowed(self._control) as pipe:
            return pipe.recv_bytes()

    def open(self) -> Connection:
        """A connection to a fresh copy. A process that has ended is set up again. Raises OSError, EOFError: in vain."""
        ours, theirs = socket.socketpair()
        with ours, theirs, self._lock:
            try:
                socket.send_fds(self._control, [b"+"], [theirs.fileno()])
            except OSError:
                self._end()
                self._launch()
                with _borrowed(self._control) as pipe:
                    pipe.recv_bytes()
                socket.send_fds(self._control, [b"+"], [theirs.fileno()])
            return Connection(ours.detach())

    def close(self) -> None:
        """End the process and its copies."""
        with self._lock:
            self._end()


def _end(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    control.close()  # it ends its copies, and itself
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def receive(pipe: Connection) -> bytes:
    """The next frame of a copy. Raises CopyDied: a signal ended it. EOFError, OSError: it ended without a word."""
    frame = pipe.recv_bytes()
    if frame.startswith(DIED):
        raise CopyDied(int(frame[len(DIED) :]))
    return frame


def attempt(work: Callable[[], bytes]) -> bytes:
    """What a function returns in a copy of this very process, which must have one thread. Raises CopyDied."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _settle()
            with Connection(writer, readable=False) as pipe:
                pipe.send_bytes(work())
        finally:
            os._exit(0)
    os.close(writer)
    with Connection(reader, writable=False) as pipe:
        try:
            return pipe.recv_bytes()
        except EOFError:
            pass
        finally:
            _, status = os.waitpid(pid, 0)
    raise CopyDied(os.WTERMSIG(status) if os.WIFSIGNALED(status) else signal.SIGKILL)


def set_seconds(limit: float) -> None:
    """In a copy: end it once it has taken so much more processor time, whatever library is running. 0: don't."""
    signal.setitimer(signal.ITIMER_PROF, limit)


@contextlib.contextmanager
def seconds(limit: float) -> Iterator[None]:
    """The same for a block."""
    set_seconds(limit)
    try:
        yield
    finally:
        set_seconds(0)


def step_back() -> None:
    """In a copy whose work may be long: let others go first."""
    os.nice(NICENESS)


def more_memory(size_bytes: int) -> None:
    """In a copy: let it have so much more address space than it has now; past it, allocations fail."""
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size_bytes, most))


@contextlib.contextmanager
def memory(size_bytes: int) -> Iterator[None]:
    """The same for a block."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    more_memory(size_bytes)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _settle() -> None:
    """In a copy, first of all: a crash leaves nothing behind."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextlib.contextmanager
def _borrowed(connection: socket.socket) -> Iterator[Connection]:
    """A socket as a Connection for a moment."""
    with Connection(os.dup(connection.fileno())) as pipe:
        yield pipe


class _Copies:
    """The process itself: forks for each descriptor that it is passed, and watches what it has forked."""

    def __init__(self, control: socket.socket, serve: Serve) -> None:
        self._control, self._serve = control, serve
        self._wake, self._waker = socket.socketpair()
        self._wake.setblocking(False)
        self._waker.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        self._ends: dict[int, socket.socket] = {}  # by process
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)

    def run(self) -> None:
        """Until the control socket is closed."""
        while True:
            for number, event in self._poll.poll():
                if number == self._control.fileno():
                    message, descriptors, _, _ = socket.recv_fds(self._control, 1, 1)
                    if not message:
                        return self._kill_all()
                    if descriptors:
                        self._fork(socket.socket(fileno=descriptors[0]))
                elif number == self._wake.fileno():
                    self._reap()
                elif event & (select.POLLHUP | select.POLLERR):
                    self._kill(number)

    def _fork(self, end: socket.socket) -> None:
        try:
            pid = os.fork()
        except OSError:
            end.close()
            return
        if pid == 0:
            try:
                self._work(end)
            finally:
                os._exit(0)
        self._ends[pid] = end
        self._poll.register(end, 0)  # only that the other end is gone

    def _work(self, end: socket.socket) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _settle()
        for item in (self._control, self._wake, self._waker, *self._ends.values()):
            item.close()
        with Connection(end.detach()) as pipe, contextlib.suppress(EOFError, OSError):
            self._serve(pipe)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake.recv(4096):
                pass
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                end = self._ends.pop(pid)
                self._poll.unregister(end)
                if os.WIFSIGNALED(status):
                    last = DIED + str(os.WTERMSIG(status)).encode()
                    with contextlib.suppress(OSError):
                        end.send(struct.pack("!i", len(last)) + last, socket.MSG_DONTWAIT)
                end.close()

    def _kill(self, number: int) -> None:
        for pid, end in self._ends.items():
            if end.fileno() == number:
                os.kill(pid, signal.SIGKILL)
                return

    def _kill_all(self) -> None:
        for pid in self._ends:
            os.kill(pid, signal.SIGKILL)


def main() -> None:
    """Entry point of the process: the number of the inherited socket, and the set-up function."""
    control = socket.socket(fileno=int(sys.argv[1]))
    module, _, name = sys.argv[2].partition(":")
    with _borrowed(control) as pipe:
        serve, told = getattr(importlib.import_module(module), name)(pipe.recv_bytes())
        pipe.send_bytes(told)
    gc.collect()
    gc.freeze()  # or each copy would write to, and so copy, pages that it only reads
    _Copies(control, serve).run()


if __name__ == "__main__":
    main()
