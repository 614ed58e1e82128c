"""Connections before they have asked anything: how many there may be, how long and how large a head or a body may be.

In: a listening socket. Out: connections for uvicorn, each accepted when there is room. Where there is none, the one
that has been silent or half-said longest makes way: who keeps others out by saying nothing is the first to go. What was
refused is told in the log, in sums.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from itertools import takewhile
from typing import Protocol

from quantize.serve.logs import Log

MOST_CONNECTIONS = 10_000
SPARE_FILES = 64  # for the log, the models' processes, the libraries
SWEEP_SECONDS = 0.25
TELL_SECONDS = 2.0
YOUNG_SECONDS = 0.2  # that one which has just come in has to say something, whoever else is at the door


class Stage(Enum):
    """What a connection is waiting for. A request that is whole is none of these: it is being answered."""

    SILENT = "silent"
    HEAD = "head"
    BODY = "body"


@dataclass(frozen=True)
class DoorLimits:
    """Bytes of a head, its address in them; headers; seconds for each stage; connections in all."""

    head_bytes: int = 64 << 10
    url_bytes: int = 16 << 10
    headers: int = 128
    silent_seconds: float = 30.0
    head_seconds: float = 10.0
    body_seconds: float = 20.0
    connections: int = 1000

    def seconds(self, stage: Stage) -> float:
        """How long a connection may be in a stage."""
        limits = {Stage.SILENT: self.silent_seconds, Stage.HEAD: self.head_seconds, Stage.BODY: self.body_seconds}
        return limits[stage]


class Guest(Protocol):
    """A connection, as the door sees it."""

    def too_slow(self, stage: Stage) -> None:
        """The time of a stage is over: say so and go."""

    def make_way(self) -> None:
        """Go at once."""


class Door:
    """Knows every connection and what it is waiting for."""

    def __init__(self, limits: DoorLimits, log: Log) -> None:
        self.limits = limits
        self.count = 0
        self._log = log
        self._stages: dict[Stage, dict[Guest, float]] = {stage: {} for stage in Stage}
        self._left = asyncio.Event()
        self._refused: Counter[str] = Counter()
        self._since = 0.0  # what is in the sums

    def enter(self, guest: Guest) -> None:
        """A new connection, which has said nothing."""
        self.count += 1
        self.place(guest, None, Stage.SILENT)

    def leave(self, guest: Guest, stage: Stage | None) -> None:
        """It is closed."""
        self.count -= 1
        self.place(guest, stage, None)
        self._left.set()

    def place(self, guest: Guest, before: Stage | None, after: Stage | None) -> None:
        """It has gone from one stage to another; None is being answered, or gone."""
        if before is not None:
            self._stages[before].pop(guest, None)
        if after is not None:
            self._stages[after][guest] = time.monotonic()

    def refused(self, why: str) -> None:
        """Count one that was refused."""
        if not self._refused:
            self._since = time.monotonic()
        self._refused[why] += 1

    async def accept(self, listener: socket.socket, make: Callable[[], asyncio.Protocol]) -> None:
        """Let connections in, one at a time, for ever. make: uvicorn's protocol, which enters by itself."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while True:
            if self.count >= self.limits.connections:
                await _knock(listener)
                if not self._make_room():
                    await self._wait_for_one_to_leave()
                    continue
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                await _knock(listener)
                continue
            except OSError:  # no more files in this process, or the other side is gone already
                self.refused("not accepted")
                self._make_room()
                await asyncio.sleep(SWEEP_SECONDS)
                continue
            connection.setblocking(False)
            try:
                await loop.connect_accepted_socket(make, connection)
            except BaseException as exc:
                connection.close()
                if not isinstance(exc, OSError):
                    raise

    async def _wait_for_one_to_leave(self) -> None:
        if not self._refused["kept waiting"]:
            self.refused("kept waiting")
        self._left.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._left.wait(), YOUNG_SECONDS)

    def _make_room(self) -> bool:
        """End the connection that has been silent or half-said longest, unless it has only just come."""
        old = time.monotonic() - YOUNG_SECONDS
        for stage in Stage:
            for guest, since in self._stages[stage].items():
                if since > old:
                    break
                self.place(guest, stage, None)
                self.refused("made way")
                guest.make_way()
                return True
        return False

    async def sweep(self) -> None:
        """End what takes too long, and tell the log, for ever."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now = time.monotonic()
            for stage in Stage:
                for guest in self._over(stage, now - self.limits.seconds(stage)):
                    self.place(guest, stage, None)
                    if stage is not Stage.SILENT:
                        self.refused(f"{stage.value} too slow")
                    guest.too_slow(stage)
            if self._refused and now - self._since >= TELL_SECONDS:
                self.tell()

    def _over(self, stage: Stage, since: float) -> list[Guest]:
        """Those that have been in a stage since before; the first ones in it are the oldest."""
        return [guest for guest, _ in takewhile(lambda entry: entry[1] < since, self._stages[stage].items())]

    def tell(self) -> None:
        """What was refused since it was last told."""
        told = {why.replace(" ", "_"): count for why, count in sorted(self._refused.items())}
        self._refused.clear()
        if told:
            self._log.warning("connections_refused", open=self.count, limit=self.limits.connections, **told)


async def _knock(listener: socket.socket) -> None:
    """Wait until somebody wants to come in."""
    loop, came = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(listener, came.set)
    try:
        await came.wait()
    finally:
        loop.remove_reader(listener)


def room_for_connections(others: int) -> int:
    """How many connections this process may have. others: files that it needs for answers to upstreams.

    The limit on open files is raised as far as the system lets it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + SPARE_FILES + others
    if soft != resource.RLIM_INFINITY and soft < wanted:
        more = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            soft = more
    files = wanted if soft == resource.RLIM_INFINITY else soft
    return max(16, min(MOST_CONNECTIONS, files - SPARE_FILES - others - files // 8))
