"""Ray: the Cluster that its actors, tasks and objects are. The only module that imports it, when it is needed.

In: an address as the user gives it. Out: a RayCluster for as long as a context is open.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from quantize.build.spread.cluster import Handle, Lost, Node, Takes, WorkFailed
from quantize.errors import MissingExtraError, UsageError, first_line

LOCAL, AUTO = "local", "auto"
REACH_SECONDS = 10.0
ADDRESS = re.compile(r"(ray://)?[^\s/:]+:\d+")


def ray_module() -> Any:
    """Ray. Raises MissingExtraError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # tasks without a GPU: leave the environment alone
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
    except ImportError as exc:
        raise MissingExtraError("--cluster", "ray") from exc
    return ray


class RayScheduler:
    """Clusters of Ray. "local" is one of this machine for as long as it is open, "auto" the one that runs here."""

    def check(self, address: str) -> None:
        """Look at an address, without connecting. Raises UsageError, MissingExtraError."""
        if address not in {LOCAL, AUTO} and not ADDRESS.fullmatch(address):
            hint = "use --cluster local, --cluster auto or --cluster ray://HOST:10001"
            raise UsageError(f"--cluster {address!r} is no address of a cluster", hint=hint)
        ray_module()

    @contextmanager
    def connected(self, address: str) -> Iterator[RayCluster]:
        """Connect: "local", "auto", ray://HOST:PORT, HOST:PORT. Raises MissingExtraError; UsageError: no answer."""
        ray = ray_module()
        _reach(os.environ.get("RAY_ADDRESS", "") if address == AUTO else address)
        own = {"include_dashboard": False} if address == LOCAL else {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.init(
                    address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=False,
                    namespace="quantize", **own,
                )  # fmt: skip
        except (ConnectionError, TimeoutError, ValueError, RuntimeError, OSError) as exc:
            raise _no_answer(address, exc) from exc
        try:
            yield RayCluster(ray)
        finally:
            ray.shutdown()


RAY = RayScheduler()


class RayInside:
    """See Inside."""

    def here(self) -> Node:
        """The node."""
        ray = ray_module()
        name = ray.get_runtime_context().get_node_id()
        return next(node for node in _nodes(ray) if node.name == name)

    def address(self) -> str:
        """HOST:PORT of the head."""
        return str(ray_module().get_runtime_context().gcs_address)

    def fetch(self, handle: Handle) -> Any:
        """The object."""
        return ray_module().get(handle)

    def tell(self, worker: Any, method: str, *arguments: Any) -> None:
        """Call an actor."""
        getattr(worker, method).remote(*arguments)


class RayCluster:
    """See Cluster: a worker is an actor, other work a task."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._made: dict[Any, Any] = {}  # classes and functions as Ray has them: each is sent to the cluster once
        self.inside = RayInside()

    def nodes(self) -> list[Node]:
        """The nodes that are alive, by name."""
        return _nodes(self._ray)

    def put(self, value: Any) -> Handle:
        """An object of the store."""
        found: Handle = self._ray.put(value)
        return found

    def submit(self, function: Callable[..., Any], arguments: Sequence[Any], needs: Takes, *, tries: int) -> Handle:
        """A task."""
        task = self._remote(function).options(max_retries=tries - 1, scheduling_strategy="SPREAD", **_options(needs))
        found: Handle = task.remote(*arguments)
        return found

    def cancel(self, handle: Handle) -> None:
        """Cancel a task."""
        self._ray.cancel(handle)

    def start(self, kind: type, arguments: Sequence[Any], needs: Takes) -> Handle:
        """An actor."""
        made = self._remote(kind).options(max_restarts=0, scheduling_strategy="SPREAD", **_options(needs))
        found: Handle = made.remote(*arguments)
        return found

    def call(self, worker: Any, method: str, arguments: Sequence[Any], results: int = 1) -> tuple[Handle, ...]:
        """A call of an actor."""
        answers = getattr(worker, method).options(num_returns=results).remote(*arguments)
        return tuple(answers) if isinstance(answers, list) else (answers,)

    def end(self, worker: Handle) -> None:
        """Kill an actor."""
        self._ray.kill(worker)

    def done(self, handles: Sequence[Handle], seconds: float) -> list[Handle]:
        """What is ready."""
        done, _ = self._ray.wait([*handles], num_returns=1, timeout=seconds)
        if done:
            more, _ = self._ray.wait([*handles], num_returns=len(handles), timeout=0)
            done = list(dict.fromkeys([*done, *more]))
        return [*done]

    def get(self, handle: Handle) -> Any:
        """The object of a task or call. Raises Lost, WorkFailed."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(handle)
        except errors.RayActorError as exc:
            raise Lost(first_line(exc), data=False) from exc
        except errors.RayError as exc:
            cause = getattr(exc, "cause", None) or exc
            if isinstance(exc, errors.ObjectLostError) or isinstance(cause, errors.ObjectLostError):
                raise Lost(first_line(cause), data=True) from exc
            raise WorkFailed(cause) from exc

    def _remote(self, what: Any) -> Any:
        if what not in self._made:
            self._made[what] = self._ray.remote(what)
        return self._made[what]


def _options(needs: Takes) -> dict[str, Any]:
    memory = {"memory": needs.memory_bytes} if needs.memory_bytes else {}
    return {"num_cpus": needs.cores, "num_gpus": needs.gpus, **memory}


def _nodes(ray: Any) -> list[Node]:
    found = []
    for item in ray.nodes():
        if not item["Alive"]:
            continue
        has = item["Resources"]
        found.append(
            Node(
                item["NodeID"], item["NodeManagerAddress"], int(has.get("CPU", 0)), int(has.get("GPU", 0)),
                int(has.get("memory", 0)), int(has.get("object_store_memory", 0)),
            )
        )  # fmt: skip
    return sorted(found, key=lambda node: node.name)


def _reach(address: str) -> None:
    """Ray itself tries for minutes. Raises UsageError: nothing listens at HOST:PORT."""
    if not ADDRESS.fullmatch(address):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as exc:
        raise _no_answer(address, exc) from exc


def _no_answer(address: str, exc: Exception) -> UsageError:
    hint = "start one with `ray start --head`, or use --cluster local"
    if os.environ.get("RAY_AUTH_MODE") != "token":
        hint += "; one that asks for a token, as Ray's do by default, is reached with RAY_AUTH_MODE=token"
    return UsageError(f"no Ray cluster answers at {address!r}: {first_line(exc)}", hint=hint)
