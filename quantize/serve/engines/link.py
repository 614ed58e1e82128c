"""A child process that holds a model: started, listened to, restarted when it dies.

In: what to load. Out: a Status that follows it, and for each order its frames. What these mean is left to local.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, BinaryIO, Protocol

import orjson

from quantize.serve.engines.base import EngineState, EngineTarget, Status
from quantize.serve.engines.child import load_order
from quantize.serve.failures import Failure, not_ready
from quantize.system.deaths import TAIL_BYTES, explain, last_words, oom_kills

LINE_BYTES = 64 << 20
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
DEATHS_WHILE_LOADING = 2
PING_SECONDS = 5.0
LOWER_MEMORY = "serve a smaller variant, lower --context or --concurrency, or close other programs"
HANG_SECONDS = 60.0  # one step of a large model on a slow CPU can take long; more than this is no step

Listener = Callable[[str, dict[str, Any]], None]


class Child(Protocol):
    """A running child: a socket to it, and how it ends."""

    connection: socket.socket
    pid: int

    async def wait(self) -> str:
        """Why it ended, in words."""

    def kill(self) -> None:
        """End it now."""


class ProcessChild:
    """A child in a process of its own. Of its output only what a library says as it dies is ever read."""

    def __init__(self, process: asyncio.subprocess.Process, connection: socket.socket, log: BinaryIO) -> None:
        self._process = process
        self._log = log
        self._kills = oom_kills()
        self.connection = connection
        self.pid = process.pid

    @classmethod
    async def start(cls) -> ProcessChild:
        """A fresh process at one end of a socket."""
        ours, theirs = socket.socketpair()
        log = tempfile.TemporaryFile(prefix="quantize-serve-")  # noqa: SIM115 - closed when the child has ended
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "quantize.serve.engines.child", str(theirs.fileno()),
                pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        return cls(process, ours, log)

    async def wait(self) -> str:
        """See Child."""
        code = await self._process.wait()
        wrote = self._last_output()
        if code < 0:
            death = explain(code, wrote, self._kills, lower=LOWER_MEMORY)
            return f"the model's process was {death.reason}; {death.remedy}"
        said = last_words(wrote)
        return f"the model's process ended (exit {code})" + (f"; {said}" if said else "")

    def _last_output(self) -> str:
        """For deaths.py, which takes only what a library says as it dies: prompts may be among the rest."""
        if self._log.closed:
            return ""
        with self._log:
            self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - TAIL_BYTES))
            return self._log.read().decode("utf-8", "replace")

    def kill(self) -> None:
        """See Child."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()


class Link:
    """Keeps one child running and passes frames between it and those who wait for them."""

    def __init__(
        self, target: EngineTarget, tell: Listener, launch: Callable[[], Any] = ProcessChild.start,
    ) -> None:  # fmt: skip
        """tell(event, facts) is called when the child loads, is ready, dies or fails."""
        self.target = target
        self.status = Status()
        self._tell = tell
        self._launch = launch
        self._child: Child | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._orders: dict[int, asyncio.Queue[dict[str, Any]]] = {}
        self._next = 0
        self._unanswered = 0.0  # seconds since the oldest ping that was not answered
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the child, while there is one."""
        return self._child.pid if self._child else None

    def start(self) -> None:
        """Begin to load."""
        self._task = asyncio.create_task(self._keep_running())

    async def stop(self) -> None:
        """End the child."""
        self.status = Status(EngineState.STOPPED, 0, "the gateway is stopping", self.status.details)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def frames(self, order: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """Send an order and give its frames; an iterator that is closed early cancels the order. Raises Failure."""
        if not self.status.ready or self._writer is None:
            raise not_ready(self.target.name, self.status.reason)
        self._next += 1
        number, inbox = self._next, asyncio.Queue[dict[str, Any]]()
        self._orders[number] = inbox
        self._write({"op": "generate", "id": number, **order})
        over = False
        try:
            while not over:
                frame = await inbox.get()
                if "fail" in frame:
                    over = True
                    raise _failure(frame["fail"])
                over = "end" in frame
                yield frame
        finally:
            self._orders.pop(number, None)
            if not over:
                self._write({"op": "cancel", "id": number})

    def _write(self, order: Mapping[str, Any]) -> None:
        if self._writer is not None:
            try:
                line = orjson.dumps(order)
            except orjson.JSONEncodeError:  # a whole number of more than 64 bits, say in the schema of a tool
                line = json.dumps(order).encode()
            self._writer.write(line + b"\n")

    async def _keep_running(self) -> None:
        pause, deaths, ever_ready = FIRST_PAUSE, 0, False
        while True:
            was_ready, reason = await self._run_once()
            ever_ready = ever_ready or was_ready
            deaths = 0 if was_ready else deaths + 1
            pause = FIRST_PAUSE if was_ready else min(pause * 2, LONGEST_PAUSE)
            failed = self.status.state is EngineState.FAILED
            reason = self.status.reason if failed else reason
            if not ever_ready and (failed or deaths >= DEATHS_WHILE_LOADING):
                self.status = Status(EngineState.FAILED, 0, reason)
                self._tell("engine_failed", {"reason": reason})
                return
            waiting = f"{reason}; starting again in {pause:g} s"
            self.status = Status(EngineState.RESTARTING, 0, waiting, self.status.details)
            self._tell("engine_died", {"reason": reason, "restart_in_seconds": pause})
            await asyncio.sleep(pause)

    async def _run_once(self) -> tuple[bool, str]:
        """Run a child to its end: whether it ever was ready, and why it ended."""
        try:
            child: Child = await self._launch()
        except OSError as exc:
            return False, f"the model's process does not start: {exc.strerror or exc}"
        self._child = child
        self.status = Status(EngineState.LOADING, 0, "starting")
        self._tell("engine_starting", {"pid": child.pid, "device": self.target.serving.device})
        was_ready, self._unanswered = False, 0.0
        watch = asyncio.create_task(self._watch(child))
        try:
            reader, self._writer = await asyncio.open_connection(sock=child.connection, limit=LINE_BYTES)
            self._write(load_order(self.target.kind, self.target.model, self.target.serving))
            with contextlib.suppress(ConnectionError):
                async for line in reader:
                    self._take(orjson.loads(line))
                    was_ready = was_ready or self.status.ready
            if self.status.ready:
                self.status = Status(EngineState.RESTARTING, 0, "the model's process ended", self.status.details)
            reason = await child.wait()
            hung = self._unanswered >= HANG_SECONDS
            return was_ready, f"the model's process did not answer for {HANG_SECONDS:g} s" if hung else reason
        finally:
            watch.cancel()
            child.kill()
            if self._writer is not None:
                self._writer.close()
            self._writer = self._child = None
            self._lose_orders()
            await child.wait()  # nothing of it is left behind

    async def _watch(self, child: Child) -> None:
        """Ping a child that is ready, and end one that does not answer: what hangs must not look ready."""
        while self._unanswered < HANG_SECONDS:
            await asyncio.sleep(PING_SECONDS)
            if self.status.ready:
                if not self._unanswered:
                    self._write({"op": "ping"})
                self._unanswered += PING_SECONDS
        child.kill()

    def _take(self, frame: dict[str, Any]) -> None:
        self._unanswered = 0.0
        if "id" in frame:
            inbox = self._orders.get(frame["id"])
            if inbox is not None:
                inbox.put_nowait(frame)
        elif "progress" in frame:
            percent = int(frame["progress"])
            self.status = Status(EngineState.LOADING, percent, f"loading, {percent} %")
            self._tell("engine_loading", {"percent": percent})
        elif "ready" in frame:
            self.status = Status(EngineState.READY, 100, "", frame["ready"])
            self._tell("engine_ready", frame["ready"])
        elif "failed" in frame:
            self.status = Status(EngineState.FAILED, 0, frame["failed"])

    def _lose_orders(self) -> None:
        message = "the model's process ended while it was answering"
        fail = {"status": 503, "code": "engine_crashed", "message": message, "param": None}
        for inbox in self._orders.values():
            inbox.put_nowait({"fail": fail})


def _failure(fields: Mapping[str, Any]) -> Failure:
    status = int(fields["status"])
    lost = status >= 500
    return Failure(
        status, fields["code"], fields["message"],
        param=fields["param"], retry_after=2 if lost else None, elsewhere=lost,
    )  # fmt: skip
