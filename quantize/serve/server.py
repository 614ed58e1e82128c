"""Runs the gateway: binds the port, starts uvicorn, drains on SIGTERM.

In: targets with their placements, rules, limits, keys. Out: a running server, until a signal ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any

import uvicorn

from quantize.serve.address import Address, bind, written
from quantize.serve.app import Gateway, make_gateway
from quantize.serve.door import Door, DoorLimits, room_for_connections
from quantize.serve.engines.base import Engine, EngineTarget
from quantize.serve.engines.local import LocalEngine
from quantize.serve.front import Front
from quantize.serve.limits import Keys
from quantize.serve.logs import JSON, LogWriter, ServerLogs, make_log
from quantize.serve.monitoring import Watcher
from quantize.serve.router import Rules
from quantize.serve.service import RequestLimits
from quantize.serve.targets import UpstreamTarget
from quantize.serve.wire import Wire

BACKLOG = 2048
LAST_SECONDS = 2.0  # for those that are told that it ends to hear of it
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


class GatewayServer(uvicorn.Server):
    """uvicorn, with nothing on the way of a request that the gateway does itself, and with a door of its own.

    Once it is to end, answers under way have `grace_seconds` to be done, then each is told; it then returns.
    """

    def __init__(self, gateway: Gateway, grace_seconds: float, limits: DoorLimits) -> None:
        self._gateway, self._grace = gateway, grace_seconds
        self._door = Door(limits, gateway.log)
        self._doorkeepers: list[asyncio.Task[None]] = []
        super().__init__(uvicorn.Config(
            gateway.app, http=partial(Wire, self._door), ws="none", lifespan="on", log_config=None,  # type: ignore[arg-type]
            access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(grace_seconds + LAST_SECONDS),
        ))  # fmt: skip

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn: connections come in by the door."""
        await super().startup(sockets=[])
        made: Any = self.config.http_protocol_class
        make = partial(made, config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        for listener in sockets or ():
            listener.listen(BACKLOG)
            self._doorkeepers.append(asyncio.create_task(self._door.accept(listener, make)))
        self._doorkeepers.append(asyncio.create_task(self._door.sweep()))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        for task in self._doorkeepers:
            task.cancel()
        await asyncio.gather(*self._doorkeepers, return_exceptions=True)
        self._door.tell()
        end = asyncio.get_running_loop().call_later(self._grace, self._gateway.edge.stop)
        await super().shutdown(sockets)
        end.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """See uvicorn: without raising the signal again afterwards."""
        if threading.current_thread() is threading.main_thread():
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


async def _serve(gateway: Gateway, listener: socket.socket, address: Address, tell: Callable[[str], None]) -> None:
    upstreams = sum(slots.concurrency for slots in gateway.service.slots.values())
    limits = DoorLimits(connections=room_for_connections(upstreams))
    server = GatewayServer(gateway, address.grace_seconds, limits)
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
