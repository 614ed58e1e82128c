"""Another scheduler than Ray, as somebody else would write it: processes of this machine and files of a folder.

A handle is a file that will hold a result; a worker is a process that listens on a socket beside it. `files://FOLDER`
connects to it, from any process. It plans nothing: what is submitted begins at once.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

from quantize.build.spread.cluster import Handle, Lost, Node, Takes, WorkFailed
from quantize.errors import UsageError

NODE = "FILES_NODE"
NODES = [Node(name, "127.0.0.1", 1, 0, 0, 150 << 20) for name in ("node-a", "node-b")]


@dataclass(frozen=True)
class File:
    """A handle."""

    path: Path

    def write(self, result: tuple[str, Any]) -> None:
        scratch = self.path.with_suffix(".part")
        scratch.write_bytes(pickle.dumps(result))
        scratch.rename(self.path)


class WorkerFile(File):
    """The handle of a worker: the socket that it listens at."""


@dataclass(frozen=True)
class Inside:
    """See Inside."""

    folder: Path

    def here(self) -> Node:
        return next(node for node in NODES if node.name == os.environ[NODE])

    def address(self) -> str:
        return f"files://{self.folder}"

    def fetch(self, handle: Handle) -> Any:
        assert isinstance(handle, File)
        return pickle.loads(handle.path.read_bytes())[1]

    def tell(self, worker: Handle, method: str, *arguments: Any) -> None:
        assert isinstance(worker, WorkerFile)
        _send(worker, method, arguments, [File(self.folder / uuid.uuid4().hex)])


def _send(worker: File, method: str, arguments: Sequence[Any], results: Sequence[File]) -> None:
    while True:  # until it listens
        try:
            with Client(str(worker.path)) as connection:
                connection.send((method, arguments, results))
            return
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.05)


@dataclass
class FileCluster:
    """See Cluster."""

    folder: Path
    processes: dict[Handle, subprocess.Popen[bytes]] = field(default_factory=dict)  # of workers, and of submitted work
    doing: dict[Handle, Handle] = field(default_factory=dict)  # result -> the worker that it comes from

    @property
    def inside(self) -> Inside:
        return Inside(self.folder)

    def nodes(self) -> list[Node]:
        return NODES

    def put(self, value: Any) -> Handle:
        handle = self._file()
        handle.write(("value", value))
        return handle

    def submit(self, function: Callable[..., Any], arguments: Sequence[Any], needs: Takes, *, tries: int) -> Handle:
        return self._begin("work", (function, arguments))

    def cancel(self, handle: Handle) -> None:
        self.end(handle)

    def start(self, kind: type, arguments: Sequence[Any], needs: Takes) -> Handle:
        return self._begin("worker", (kind, arguments))

    def call(self, worker: Handle, method: str, arguments: Sequence[Any], results: int = 1) -> tuple[Handle, ...]:
        assert isinstance(worker, File)
        files = [self._file() for _ in range(results)]
        self.doing.update(dict.fromkeys(files, worker))
        threading.Thread(target=_send, args=(worker, method, arguments, files), daemon=True).start()
        return tuple(files)

    def end(self, worker: Handle) -> None:
        self.processes[worker].kill()
        self.processes[worker].wait()

    def done(self, handles: Sequence[Handle], seconds: float) -> list[Handle]:
        give_up = time.monotonic() + seconds
        while True:
            found = [handle for handle in handles if self._is_there(handle) or self._is_gone(handle)]
            if found or time.monotonic() > give_up:
                return found
            time.sleep(0.02)

    def get(self, handle: Handle) -> Any:
        while not self._is_there(handle):
            if self._is_gone(handle) and not self._is_there(handle):
                raise Lost("its process ended", data=False)
            time.sleep(0.02)
        assert isinstance(handle, File)
        kind, value = pickle.loads(handle.path.read_bytes())
        if kind == "error":
            raise WorkFailed(value)
        return value

    def close(self) -> None:
        for handle in self.processes:
            self.end(handle)

    def _is_there(self, handle: Handle) -> bool:
        assert isinstance(handle, File)
        return handle.path.exists()

    def _is_gone(self, handle: Handle) -> bool:
        return self.processes[self.doing.get(handle, handle)].poll() is not None

    def _file(self) -> File:
        return File(self.folder / uuid.uuid4().hex)

    def _begin(self, kind: str, what: Any) -> Handle:
        handle = (WorkerFile if kind == "worker" else File)(self.folder / uuid.uuid4().hex)
        payload = self._file()
        payload.path.write_bytes(pickle.dumps(what))
        node = NODES[len(self.processes) % len(NODES)].name
        code = "import sys; from tests.cluster.files import main; main(*sys.argv[1:])"
        command = [sys.executable, "-c", code, kind, str(handle.path), str(payload.path)]
        self.processes[handle] = subprocess.Popen(command, env={**os.environ, NODE: node})
        return handle


class FileScheduler:
    """See Scheduler."""

    def check(self, address: str) -> None:
        if not Path(address.removeprefix("files://")).is_dir():
            raise UsageError(f"--cluster {address!r}: no such folder")

    @contextmanager
    def connected(self, address: str) -> Iterator[FileCluster]:
        cluster = FileCluster(Path(address.removeprefix("files://")))
        try:
            yield cluster
        finally:
            cluster.close()


FILES = FileScheduler()


def _perform(function: Callable[..., Any], arguments: Sequence[Any], results: Sequence[File]) -> None:
    try:
        values = [Inside(item.path.parent).fetch(item) if type(item) is File else item for item in arguments]
        answer = function(*values)
        for file, value in zip(results, answer if len(results) > 1 else [answer], strict=True):
            file.write(("value", value))
    except Exception as exc:  # noqa: BLE001 - it is the caller's
        traceback.print_exc()
        results[0].write(("error", exc))


def main(kind: str, handle: str, payload: str) -> None:
    """In a process of its own: one piece of work, or a worker until it is killed."""
    what, arguments = pickle.loads(Path(payload).read_bytes())
    if kind == "work":
        _perform(what, arguments, [File(Path(handle))])
        return
    worker = what(*arguments)
    with Listener(handle, "AF_UNIX", backlog=100) as listener:
        while True:
            with contextlib.suppress(EOFError), listener.accept() as connection:
                method, given, results = connection.recv()
                _perform(getattr(worker, method), given, results)
