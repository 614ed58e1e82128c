"""Connecting to a Ray cluster, and what it has.

In: an address as the user gives it. Out: a connection for as long as a context is open; nodes. Ray is imported when it
is needed, and never before.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from quantize.errors import MissingExtraError, PlanError, UsageError, first_line

LOCAL, AUTO = "local", "auto"
REACH_SECONDS = 10.0
ADDRESS = re.compile(r"(ray://)?[^\s/:]+:\d+")


@dataclass(frozen=True)
class Node:
    """A node that is alive. memory_bytes, store_bytes: what Ray may use of it, and its share for objects."""

    name: str
    address: str
    cpus: int
    gpus: int
    memory_bytes: int
    store_bytes: int


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


def check_address(address: str) -> None:
    """Raise UsageError for what is no address."""
    if address not in {LOCAL, AUTO} and not ADDRESS.fullmatch(address):
        hint = "use --cluster local, --cluster auto or --cluster ray://HOST:10001"
        raise UsageError(f"--cluster {address!r} is no address of a cluster", hint=hint)


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, connected: "local" starts a cluster of this machine for as long as the context is open, "auto" finds the one
    that runs here, ray://HOST:PORT or HOST:PORT is another.

    Raises MissingExtraError; UsageError where nothing answers.
    """
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
        yield ray
    finally:
        ray.shutdown()


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


def nodes(ray: Any) -> list[Node]:
    """The nodes that are alive, by name."""
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


def able_nodes(ray: Any, *, gpu: bool) -> list[Node]:
    """Nodes that can build now: a head without CPUs is none."""
    return [node for node in nodes(ray) if node.cpus > 0 and (node.gpus > 0 or not gpu)]


def working_nodes(ray: Any, *, gpu: bool) -> list[Node]:
    """As able_nodes. Raises PlanError where there are none."""
    found = able_nodes(ray, gpu=gpu)
    if not found:
        hint = "add nodes with GPUs, or leave out --device" if gpu else "add nodes with `ray start --address=…`"
        raise PlanError(f"the cluster has no node with {'a GPU' if gpu else 'CPUs'}", hint=hint)
    return found


def cause_of(error: BaseException) -> BaseException:
    """What a task raised, without what Ray wraps round it."""
    return getattr(error, "cause", None) or error
