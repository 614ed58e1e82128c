"""What builds and passes ask of a cluster, whichever scheduler runs it; which scheduler an address means.

In: an address as the user gives it. Out: a Cluster for as long as a context is open. A scheduler is a module with a
SchedulerKind's class, and a line in SCHEDULERS; nobody else knows one by name.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from quantize.errors import PlanError

SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")

Handle = Hashable
"""Stands for the result of work, or for a value that was put there. As an argument of work it is its value; in a list
among the arguments it stays a handle, which Inside.fetch takes."""


@dataclass(frozen=True)
class Node:
    """A node that is alive. memory_bytes, store_bytes: what work may use of it, and its share for results."""

    name: str
    address: str
    cpus: int
    gpus: int
    memory_bytes: int
    store_bytes: int


@dataclass(frozen=True)
class Takes:
    """What work takes of its node; memory_bytes 0: nobody has said."""

    cores: int = 0
    gpus: int = 0
    memory_bytes: int = 0


class Lost(Exception):
    """A worker is gone, or data that a call needs. data: it is the data."""

    def __init__(self, reason: str, *, data: bool) -> None:
        super().__init__(reason)
        self.data = data


class WorkFailed(Exception):
    """Work has raised something. cause: that, without what the scheduler wraps round it."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Inside(Protocol):
    """The cluster as work on a node sees it: it goes along with the work."""

    def here(self) -> Node:
        """The node."""

    def address(self) -> str:
        """At which work on this node connects to the cluster."""

    def fetch(self, handle: Handle) -> Any:
        """The value of a handle that stayed one."""

    def tell(self, worker: Handle, method: str, *arguments: Any) -> None:
        """Call a worker, and wait for nothing."""


class Cluster(Protocol):
    """A connection to a cluster.

    A worker is an object in a process of its own, which does one thing after another. Work takes what it needs of one
    node; where it needs more than is free, it waits.
    """

    inside: Inside

    def nodes(self) -> list[Node]:
        """The nodes that are alive, by name."""

    def put(self, value: Any) -> Handle:
        """Have a value where all nodes get it."""

    def submit(self, function: Callable[..., Any], arguments: Sequence[Any], needs: Takes, *, tries: int) -> Handle:
        """Have a function called on a node, and again on another while its node or process dies."""

    def cancel(self, handle: Handle) -> None:
        """Have work not begin, or end."""

    def start(self, kind: type, arguments: Sequence[Any], needs: Takes) -> Handle:
        """A worker: an instance of a class. It is there when it answers its first call."""

    def call(self, worker: Handle, method: str, arguments: Sequence[Any], results: int = 1) -> tuple[Handle, ...]:
        """Have a worker do something; handles of its results, which stay on its node until they are fetched."""

    def end(self, worker: Handle) -> None:
        """End a worker at once."""

    def done(self, handles: Sequence[Handle], seconds: float) -> list[Handle]:
        """Of some work, what has ended, well or not; waits for the first so long."""

    def get(self, handle: Handle) -> Any:
        """The result of work. Raises Lost, WorkFailed."""


class Scheduler(Protocol):
    """A kind of cluster."""

    def check(self, address: str) -> None:
        """Look at an address, without connecting. Raises UsageError: it is none. MissingExtraError."""

    def connected(self, address: str) -> AbstractContextManager[Cluster]:
        """Connect. Raises UsageError: nothing answers. MissingExtraError."""


@dataclass(frozen=True)
class SchedulerKind:
    """schemes: of its addresses; "" where they have none. form: of its addresses, for help. where: module:object."""

    schemes: tuple[str, ...]
    form: str
    where: str

    def load(self) -> Scheduler:
        """The Scheduler."""
        found: Scheduler = pkgutil.resolve_name(self.where)
        return found


SCHEDULERS = (
    SchedulerKind(
        ("", "ray"), "auto (Ray's that runs here), local, ray://HOST:PORT", "quantize.build.spread.ray_cluster:RAY"
    ),
)


def forms() -> str:
    """What an address can be, for people."""
    return " or ".join(kind.form for kind in SCHEDULERS)


def check_address(address: str) -> None:
    """Raises as Scheduler.check does."""
    _scheduler(address).check(address)


@contextmanager
def connected(address: str) -> Iterator[Cluster]:
    """The cluster at an address, as long as the context is open. Raises as Scheduler.connected does."""
    with _scheduler(address).connected(address) as cluster:
        yield cluster


def _scheduler(address: str) -> Scheduler:
    """Of an unknown scheme, that of addresses without any says what is wrong."""
    match = SCHEME.match(address)
    known = [kind for kind in SCHEDULERS if (match[1] if match else "") in kind.schemes]
    return (known or [kind for kind in SCHEDULERS if "" in kind.schemes])[0].load()


def able_nodes(cluster: Cluster, *, gpu: bool) -> list[Node]:
    """Nodes that can build now: a head without CPUs is none."""
    return [node for node in cluster.nodes() if node.cpus > 0 and (node.gpus > 0 or not gpu)]


def working_nodes(cluster: Cluster, *, gpu: bool) -> list[Node]:
    """As able_nodes. Raises PlanError where there are none."""
    found = able_nodes(cluster, gpu=gpu)
    if not found:
        hint = "add nodes with GPUs, or leave out --device" if gpu else "add nodes to the cluster"
        raise PlanError(f"the cluster has no node with {'a GPU' if gpu else 'CPUs'}", hint=hint)
    return found
