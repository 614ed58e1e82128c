"""Heads and bodies that are slow, endless or none: they have a time and a size, and shut nobody out."""

from __future__ import annotations

import contextlib
import json
import resource
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantize.serve.door import DoorLimits, room_for_connections
from quantize.serve.service import RequestLimits
from quantize.system.process import peak_memory_bytes
from tests.serve.conftest import JSON, Running, Start, fakes

QUICK = DoorLimits(silent_seconds=0.6, head_seconds=0.5, body_seconds=0.8)
HEAD = b"GET /health HTTP/1.1\r\nhost: x\r\n"
POST = b"POST /chat HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
MIB = 1 << 20


def connect(gateway: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", gateway.port), timeout=30)


def answer(connection: socket.socket) -> bytes:
    """Until the other end closes."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def whole(connection: socket.socket) -> bytes:
    """One answer of a known length; the connection stays open."""
    raw = b""
    while b"\r\n\r\n" not in raw:
        part = connection.recv(65536)
        assert part, "it was cut off"
        raw += part
    head, _, body = raw.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split()[0])
    while len(body) < length:
        body += connection.recv(65536)
    return head


def refusal(raw: bytes) -> tuple[int, str]:
    """Status and code of a whole answer; it has a trace id, in its head as in its body."""
    head, _, body = raw.partition(b"\r\n\r\n")
    told = json.loads(body)
    assert f"x-request-id: {told['trace_id']}".encode() in head
    assert b"connection: close" in head
    return int(head[9:12]), told["error"]["code"]


def push(connection: socket.socket, start: bytes, more: bytes, size: int) -> int:
    """Send without end, until somebody answers; how many bytes were taken."""
    sent = connection.send(start)
    with contextlib.suppress(ConnectionError):
        while sent < size and not select.select([connection], [], [], 0)[0]:
            sent += connection.send(more)
    return sent


def refusals(gateway: Running) -> list[dict[str, Any]]:
    """What the log says of connections that were not let in."""
    return [line for line in gateway.lines() if line["event"] == "connections_refused"]


@pytest.fixture(scope="module")
def quick() -> Iterator[Running]:
    from tests.serve.conftest import gateways

    with gateways() as run:
        yield run(fakes(), door=QUICK, limits=RequestLimits(body_seconds=0.5))


@pytest.mark.parametrize("raw", [b"G", b"GET /health HTTP/1.1\r\n", HEAD, HEAD + b"x: " + b"y" * 5000])
def test_a_head_that_does_not_end_is_refused_in_time(quick: Running, raw: bytes) -> None:
    with connect(quick) as connection:
        connection.sendall(raw)
        started = time.monotonic()
        assert refusal(answer(connection)) == (408, "head_too_slow")
        assert time.monotonic() - started < 5


def test_a_head_that_comes_byte_by_byte_has_no_more_time(quick: Running) -> None:
    with connect(quick) as connection:
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in HEAD * 10:
                connection.sendall(bytes([byte]))
                if select.select([connection], [], [], 0.05)[0]:
                    break
        assert refusal(answer(connection)) == (408, "head_too_slow")
        assert time.monotonic() - started < 5


def test_a_slow_head_after_a_good_one(quick: Running) -> None:
    with connect(quick) as connection:
        connection.sendall(HEAD + b"\r\n")
        assert whole(connection).startswith(b"HTTP/1.1 200")
        connection.sendall(HEAD)
        assert refusal(answer(connection)) == (408, "head_too_slow")


def test_a_slow_body_is_refused_in_time(quick: Running) -> None:
    with connect(quick) as connection:
        connection.sendall(
            b"POST /chat HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 90\r\n\r\n{"
        )
        assert refusal(answer(connection)) == (408, "body_too_slow")


def test_a_body_that_nobody_asked_for_is_not_waited_for(quick: Running) -> None:
    """The answer is there; what goes on sending is cut off."""
    with connect(quick) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000\r\n\r\n")
        assert whole(connection).startswith(b"HTTP/1.1 200")
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < 20:
                connection.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - started < 10


def test_a_connection_that_says_nothing_is_closed(quick: Running) -> None:
    with connect(quick) as connection:
        started = time.monotonic()
        assert answer(connection) == b""
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("start", "more", "wanted"),
    [
        (HEAD + b"x: ", b"y" * 65536, (431, "head_too_large")),
        (HEAD, b"x: y\r\n" * 1000, (431, "head_too_large")),
        (b"GET /", b"a" * 65536, (414, "url_too_long")),
        (b"\r\n" * 1000, b"\r\n" * 32768, (431, "head_too_large")),
        (POST + b"transfer-encoding: chunked\r\n\r\n0\r\n", b"x: y\r\n" * 1000,
         (431, "head_too_large")),
    ],
    ids=["a header", "headers", "an address", "nothing", "headers after a body"],
)  # fmt: skip
def test_what_does_not_end_is_refused_early(
    start: Start, gateway: Running, more: bytes, wanted: tuple[int, str], request: pytest.FixtureRequest
) -> None:
    begin: bytes = request.node.callspec.params["start"]
    with connect(gateway) as connection:
        sent = push(connection, begin, more, 64 * MIB)
        raw = answer(connection)
    assert sent < 16 * MIB  # what the system had taken on the way
    assert refusal(raw) == wanted
    assert gateway.ask("GET", "/health").status == 200


def test_what_is_no_http_gets_an_error_object(gateway: Running) -> None:
    with connect(gateway) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01hello")
        assert refusal(answer(connection)) == (400, "invalid_http")


def test_requests_one_after_the_other_and_all_at_once(gateway: Running) -> None:
    with connect(gateway) as connection:
        for _ in range(3):
            connection.sendall(HEAD + b"\r\n")
            assert whole(connection).startswith(b"HTTP/1.1 200")
        connection.sendall((HEAD + b"\r\n") * 5)
        seen = b""
        while seen.count(b'"status":"ok"') < 5:
            part = connection.recv(65536)
            assert part, "it was cut off"
            seen += part


def test_the_one_that_was_silent_longest_makes_way(start: Start) -> None:
    gateway = start(fakes(), door=DoorLimits(connections=8))
    silent = [connect(gateway) for _ in range(30)]
    try:
        for _ in range(5):
            started = time.monotonic()
            assert gateway.chat("hi").status == 200
            assert time.monotonic() - started < 2
        assert answer(silent[0]) == b""
    finally:
        for connection in silent:
            connection.close()
    gateway.wait(lambda: sum(line.get("made_way", 0) for line in refusals(gateway)) >= 22, 15)
    assert {line["limit"] for line in refusals(gateway)} == {8}


def test_answers_under_way_never_make_way(start: Start) -> None:
    gateway = start(fakes(slots=4), door=DoorLimits(connections=4), limits=RequestLimits(concurrency=4, queue=0))
    body = json.dumps({"messages": [{"role": "user", "content": "one hang!"}], "stream": True}).encode()
    head = POST.replace(b"/chat", b"/v1/chat/completions") + b"content-length: %d\r\n\r\n" % len(body)
    busy = [connect(gateway) for _ in range(4)]
    for connection in busy:
        connection.sendall(head + body)
        seen = b""
        while b"one" not in seen:
            part = connection.recv(65536)
            assert part, "it was cut off"
            seen += part
    waits = threading.Thread(target=lambda: answers.append(gateway.ask("GET", "/health").status))
    answers: list[int] = []
    waits.start()
    time.sleep(0.5)
    assert answers == []
    busy[0].close()
    waits.join(10)
    assert answers == [200]
    for connection in busy[1:]:
        assert not select.select([connection], [], [], 0)[0], "it was cut off"
        connection.close()


def test_room_is_what_the_system_gives() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        assert 1000 < room_for_connections(10) <= 10_000
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= before[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def limited(gateway: Running, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Running, Path]]:
    """`quantize serve` of another gateway's model, in a process that may have 256 files open; its log."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "quantize", "serve", f"far={gateway.url}/v1#fake", "--port", "0"]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command, stderr=stderr, cwd=tmp_path,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)),
        )  # fmt: skip
    try:
        give_up = time.monotonic() + 60
        while b'"listening"' not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < give_up
            time.sleep(0.05)
        url: str = next(line["url"] for line in events(log) if line["event"] == "listening")
        running = Running(int(url.rpartition(":")[2]), gateway.gateway, gateway.log, gateway.server)
        running.wait(running.is_ready, 30)
        yield process, running, log
    finally:
        process.terminate()
        assert process.wait(30) == 0


def events(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_bytes().splitlines() if line.startswith(b"{")]


def test_four_hundred_half_open_connections_shut_nobody_out(
    limited: tuple[subprocess.Popen[bytes], Running, Path],
) -> None:
    process, gateway, log = limited
    half = [connect(gateway) for _ in range(400)]
    slowest = 0.0
    try:
        for connection in half:
            connection.sendall(HEAD)
        for _ in range(20):
            started = time.monotonic()
            assert gateway.chat("hi there").json["choices"][0]["message"]["content"] == "hi there "
            slowest = max(slowest, time.monotonic() - started)
        assert len(list(Path(f"/proc/{process.pid}/fd").iterdir())) < 256
    finally:
        for connection in half:
            connection.close()
    print(f"slowest of 20 new requests beside 400 half-open connections: {slowest:.3f} s")
    assert slowest < 2
    gateway.wait(lambda: sum(line.get("made_way", 0) for line in events(log)) > 200, 15)
    assert {line["limit"] < 256 for line in events(log) if line["event"] == "connections_refused"} == {True}


@pytest.mark.parametrize(
    ("begin", "size", "status"), [(HEAD + b"x: ", 67_000_000, 431), (b"GET /", 33_000_000, 414)], ids=["head", "url"]
)
def test_a_huge_head_takes_no_memory(
    limited: tuple[subprocess.Popen[bytes], Running, Path], begin: bytes, size: int, status: int
) -> None:
    process, gateway, _ = limited
    before = peak_memory_bytes(process.pid)
    for _ in range(3):
        with connect(gateway) as connection:
            push(connection, begin, b"a" * 65536, size)
            assert refusal(answer(connection))[0] == status
    assert peak_memory_bytes(process.pid) - before < 8 * MIB
    assert gateway.chat("hi").status == 200


def test_what_is_under_way_when_the_grace_is_over_is_told(start: Start) -> None:
    gateway = start(fakes(slots=4), limits=RequestLimits(concurrency=4, queue=4), grace=0.5)
    found: dict[str, Any] = {}

    def ask(name: str, **fields: Any) -> None:
        found[name] = gateway.chat("one hang!", **fields)

    threads = [threading.Thread(target=ask, args=("stream",), kwargs={"stream": True}),
               threading.Thread(target=ask, args=("whole",))]  # fmt: skip
    for thread in threads:
        thread.start()
    gateway.wait(lambda: gateway.ask("GET", "/health").json["active_requests"] == 2)
    gateway.server.should_exit = True
    for thread in threads:
        thread.join(15)
    stream, plain = found["stream"], found["whole"]
    assert stream.status == 200
    assert stream.events[-1]["error"]["code"] == "stopping"
    assert stream.events[-1]["trace_id"] == stream.headers["x-request-id"]
    assert (plain.status, plain.json["error"]["code"]) == (503, "stopping")
    assert plain.headers["retry-after"].isdigit()
    assert plain.json["trace_id"] == plain.headers["x-request-id"]
    statuses = [(line["status"], line["code"]) for line in gateway.lines() if line["event"] == "request"]
    assert sorted(statuses) == [(200, "stopping"), (503, "stopping")]


def test_a_body_that_is_nested_too_deeply_says_so(gateway: Running) -> None:
    schema: Any = {"type": "string"}
    for _ in range(200):
        schema = {"type": "object", "properties": {"a": schema}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = gateway.chat("hi", response_format=form)
    assert (answer.status, answer.json["error"]["code"]) == (400, "nested_too_deeply")
    assert gateway.ask("POST", "/chat", b"{", JSON).json["error"]["code"] == "invalid_json"
