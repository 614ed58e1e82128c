"""Runs the gateway: binds the port, starts uvicorn, drains on SIGTERM.

In: targets with their placements, rules, limits, keys. Out: a running server, until a signal ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import uvicorn

from quantize.serve.address import Address, bind, written
from quantize.serve.app import Gateway, make_gateway
from quantize.serve.engines.base import Engine, EngineTarget
from quantize.serve.engines.local import LocalEngine
from quantize.serve.front import Front
from quantize.serve.limits import Keys
from quantize.serve.logs import JSON, LogWriter, ServerLogs, make_log
from quantize.serve.monitoring import Watcher
from quantize.serve.router import Rules
from quantize.serve.service import RequestLimits
from quantize.serve.targets import UpstreamTarget

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 30


def run(
    targets: Sequence[EngineTarget | UpstreamTarget], rules: Rules, limits: RequestLimits, keys: Keys, address: Address,
    front: Front, log_level: str = "info", log_form: str = JSON,
) -> None:  # fmt: skip
    """Serve until SIGTERM or SIGINT. Raises UsageError: the address is taken."""
    listener = bind(address)
    writer = LogWriter(sys.stderr.buffer)
    log = make_log(writer, log_level, log_form)
    logging.basicConfig(handlers=[ServerLogs(log)], level=logging.WARNING, force=True)
    try:
        gateway = make_gateway(lambda watcher: _engines(targets, watcher), rules, limits, keys, log, front)
        gc.collect()
        gc.freeze()  # what is loaded now stays: collections need not look at it again
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(gateway, listener, address, lambda url: log.info("listening", url=url, keys=bool(keys))))
        log.info("stopped")
    finally:
        listener.close()
        writer.close()


def _engines(targets: Sequence[EngineTarget | UpstreamTarget], watcher: Watcher) -> Mapping[str, Engine]:
    engines: dict[str, Engine] = {}
    for target in targets:
        tell = watcher.about(target.name)
        if isinstance(target, UpstreamTarget):
            from quantize.serve.engines.upstream import UpstreamEngine

            engines[target.name] = UpstreamEngine(target, tell)
        else:
            engines[target.name] = LocalEngine(target, tell)
    return engines


def make_config(gateway: Gateway, grace_seconds: int) -> uvicorn.Config:
    """uvicorn, with nothing on the way of a request that the gateway does itself."""
    return uvicorn.Config(
        gateway.app, http="httptools", ws="none", lifespan="on", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, backlog=BACKLOG, timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=grace_seconds,
    )  # fmt: skip


class _Server(uvicorn.Server):
    """A signal ends it once answers under way are done; it then returns, and the process exits with 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """See uvicorn: without raising the signal again afterwards."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


async def _serve(gateway: Gateway, listener: socket.socket, address: Address, tell: Callable[[str], None]) -> None:
    server = _Server(make_config(gateway, address.grace_seconds))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    host, port = listener.getsockname()[:2]
    tell(f"http://{written(host, port)}")
    await serving


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
