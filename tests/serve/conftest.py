"""A gateway on a loopback port, in a thread, in front of engines that a test chooses; and a plain HTTP client."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

import uvicorn

from quantize.errors import UsageError
from quantize.runtimes.base import ModelRef
from quantize.runtimes.llama_cpp.kind import LLAMA_CPP
from quantize.runtimes.served import Serving
from quantize.serve.app import DIRECT, Gateway, make_gateway
from quantize.serve.door import DoorLimits
from quantize.serve.engines.base import Engine, EngineTarget
from quantize.serve.engines.fake import fake_engine
from quantize.serve.engines.local import LocalEngine
from quantize.serve.front import Front
from quantize.serve.limits import Keys, key_line, load_keys
from quantize.serve.logs import LogWriter, make_log
from quantize.serve.monitoring import Watcher
from quantize.serve.router import Rules
from quantize.serve.server import GatewayServer
from quantize.serve.service import RequestLimits
from tests.conftest import Built

DOOR = DoorLimits()
SERVED_CONTEXT = 512
JSON = {"content-type": "application/json"}
MakeEngines = Callable[[Watcher], Mapping[str, Engine]]


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The data of server-sent events, parsed; [DONE] as it is."""
        lines = [line[6:] for line in self.body.decode().split("\n\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


@dataclass
class Running:
    """A gateway that runs."""

    port: int
    gateway: Gateway
    log: io.BytesIO
    server: uvicorn.Server
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        """One request on a connection of its own; a body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, raw, {**JSON, **self.headers, **(headers or {})})
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def chat(self, text: str, **fields: Any) -> Answer:
        """POST /v1/chat/completions with one message."""
        return self.ask("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})

    def wait(self, check: Callable[[], bool], seconds: float = 10) -> float:
        """Until a check holds; how long that took."""
        started = time.monotonic()
        while not check():
            assert time.monotonic() - started < seconds, "it did not happen in time"
            time.sleep(0.01)
        return time.monotonic() - started

    def is_listening(self) -> bool:
        with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", self.port), timeout=5):
            return True
        return False

    def is_ready(self) -> bool:
        return self.ask("GET", "/ready").status == 200

    def lines(self) -> list[dict[str, Any]]:
        """The log so far."""
        time.sleep(0.05)
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


Start = Callable[..., Running]


@contextmanager
def gateways() -> Iterator[Start]:
    """start(engines, limits=…, rules=…, keys=…) runs a gateway; all end together."""
    running: list[tuple[Running, threading.Thread, LogWriter]] = []

    def run(
        engines: MakeEngines, *, rules: Rules | None = None, limits: RequestLimits | None = None, keys: Keys | None =
        None, ready: bool = True, port: int = 0, front: Front = DIRECT,
        door: DoorLimits = DOOR, grace: float = 3,
    ) -> Running:  # fmt: skip
        log = io.BytesIO()
        writer = LogWriter(log)
        chosen = rules or Rules("fake")
        try:
            gateway = make_gateway(
                engines, chosen, limits or RequestLimits(), keys or Keys({}), make_log(writer), front
            )
        except UsageError:
            writer.close()
            raise
        listener = socket.create_server(("127.0.0.1", port))
        server = GatewayServer(gateway, grace, door)
        server.config.load()
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        found = Running(listener.getsockname()[1], gateway, log, server)
        running.append((found, thread, writer))
        found.wait(lambda: server.started)
        if ready:
            found.wait(found.is_ready)
        return found

    try:
        yield run
    finally:
        for item, thread, writer in reversed(running):
            item.server.should_exit = True
            thread.join(timeout=15)
            assert not thread.is_alive(), "the gateway does not stop"
            writer.close()


def fakes(**options: Any) -> MakeEngines:
    """One fake engine named `fake`."""
    return lambda watcher: {"fake": fake_engine("fake", watcher.about("fake"), **options)}


@pytest.fixture(scope="session")
def weights(built: Built) -> Path:
    """The tiny model as a GGUF file; a file of tests that needs another one has a fixture of its own by this name."""
    (path,) = built.store.root.glob("*/q8_0/current/*.gguf")
    return path


@contextmanager
def gguf_gateway(weights: Path, serving: Serving, *, queue: int = 64) -> Iterator[Running]:
    """A gateway with one GGUF file, as `tiny`, in llama.cpp in a process of its own."""
    target = EngineTarget("tiny", LLAMA_CPP, ModelRef(weights.parent, "gguf", weights.name), serving)
    with gateways() as run:
        yield run(
            lambda watcher: {"tiny": LocalEngine(target, watcher.about("tiny"))},
            rules=Rules("tiny"), limits=RequestLimits(concurrency=serving.slots, queue=queue),
        )  # fmt: skip


@pytest.fixture(scope="module")
def served(weights: Path) -> Iterator[Running]:
    """`weights`, with a context of SERVED_CONTEXT, for all tests of a file."""
    with gguf_gateway(weights, Serving(SERVED_CONTEXT, slots=2, threads=1)) as running:
        yield running


@pytest.fixture
def start() -> Iterator[Start]:
    """Gateways of one test."""
    with gateways() as run:
        yield run


@pytest.fixture(scope="module")
def gateway() -> Iterator[Running]:
    """A gateway with one fake model that answers by repeating, for all tests of a file."""
    with gateways() as run:
        yield run(fakes())


def keys_of(tmp_path: Any, **keys: str) -> Keys:
    """Keys from a file with the given names and keys."""
    path = tmp_path / "keys"
    path.write_text("".join(f"{key_line(name, key)}\n" for name, key in keys.items()))
    return load_keys(path, {})
