"""Requests that no good client sends: each gets the right status, and the server lives on."""

from __future__ import annotations

import itertools
import json
import random
import socket
from collections.abc import Iterator

import pytest

from quantize.serve.service import RequestLimits
from tests.serve.conftest import JSON, Running, fakes, gateways

PATHS = ("/v1/chat/completions", "/v1/completions", "/chat", "/v1/generate")
GOOD = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/chat": {"message": "hi"},
    "/v1/generate": {"prompt": "hi"},
}
NOT_JSON = [
    b"", b"{", b"[1,", b"nul", b"\xff\xfe", b'{"a": "\xc3\x28"}', b'{"message": "\x00"}', b"{'a': 1}", b"{} {}",
    b"[" * 100_000, b'{"a":' * 50_000, b"\x1f\x8b\x08\x00", b'{"message": "\\ud800"}', b"<xml/>", b'{"a": NaN}',
]  # fmt: skip
WRONG_TYPES = [None, 7, [], {}, True, "", ["a"], {"a": 1}, 1e308, -1, "\u202e" * 10]
FIELDS = ["model", "max_tokens", "temperature", "top_p", "stop", "seed", "stream", "messages", "message", "prompt"]


@pytest.fixture(scope="module")
def target() -> Iterator[Running]:
    with gateways() as run:
        yield run(fakes(), limits=RequestLimits(max_body_bytes=1_000_000, body_seconds=0.5))


def check(target: Running, path: str, body: bytes, allowed: set[int]) -> int:
    answer = target.ask("POST", path, body)
    assert answer.status in allowed, (path, body[:80], answer.body[:200])
    if answer.status != 200:
        assert set(answer.json) == {"error", "trace_id"}
    return answer.status


@pytest.mark.parametrize("path", PATHS)
def test_what_is_no_json(target: Running, path: str) -> None:
    for body in NOT_JSON:
        check(target, path, body, {400, 422})
    assert check(target, path, b"{", {400}) == 400
    assert target.is_ready()


@pytest.mark.parametrize("path", PATHS)
def test_wrong_types_in_every_field(target: Running, path: str) -> None:
    tried = 0
    for field, value in itertools.product(FIELDS, WRONG_TYPES):
        body = json.dumps({**GOOD[path], field: value}).encode()
        status = check(target, path, body, {200, 404, 422})
        assert status != 404 or field == "model"
        tried += 1
    assert tried >= 100
    assert target.is_ready()


@pytest.mark.parametrize("path", PATHS)
def test_random_bytes_and_damaged_json(target: Running, path: str) -> None:
    chance = random.Random(path)
    good = json.dumps(GOOD[path]).encode()
    for _ in range(15):
        place = chance.randrange(len(good))
        check(target, path, good[:place] + chance.randbytes(4) + good[place:], {200, 400, 422})
    assert target.is_ready()


def test_a_huge_body(target: Running) -> None:
    assert target.ask("POST", "/chat", b'{"message": "' + b"x" * 3_000_000 + b'"}').status == 413
    assert target.ask("POST", "/chat", b"{}", {"content-length": "99999999999999999999"}).status in (400, 413)
    assert target.is_ready()


RAW = [
    (b"GET / HTTP/1.1\r\nhost: x\r\nx-request-id: a\r\n\tb: c\r\n\r\n", {b"200", b"400"}),
    (b"GET /health HTTP/1.1\r\nhost: x\r\nx-request-id: a\x00b\r\n\r\n", {b"200", b"400"}),
    (b"GET /health HTTP/1.1\r\nhost: x\r\nx-request-id: a%0d%0aset-cookie: b\r\n\r\n", {b"200"}),
    (b"GET /health HTTP/1.1\r\nhost: x\r\nx-request-id: " + b"a" * 60_000 + b"\r\n\r\n", {b"200", b"400", b"431"}),
    (b"\x16\x03\x01\x02\x00\x01", {b"400"}),
    (b"GET /%00%ff/../../etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n", {b"404"}),
    (b"GET /assets/page/..%2f..%2fapp.py HTTP/1.1\r\nhost: x\r\n\r\n", {b"404"}),
    (b"GET /assets/swagger/../page/page.js HTTP/1.1\r\nhost: x\r\n\r\n", {b"404"}),
    (b"BREW /chat HTTP/1.1\r\nhost: x\r\n\r\n", {b"400", b"405"}),
    (b"POST /chat HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: -5\r\n\r\n{}", {b"400"}),
    (b"POST /chat HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
     b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", {b"400", b"422"}),
    (b"POST /chat HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n", {b"400", b"415"}),
    (b"GET /v1/models HTTP/9.9\r\nhost: x\r\n\r\n", {b"200", b"400", b"505"}),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "allowed"), RAW)
def test_raw_bytes(target: Running, raw: bytes, allowed: set[bytes]) -> None:
    with socket.create_connection(("127.0.0.1", target.port), timeout=5) as connection:
        connection.sendall(raw)
        answer = connection.recv(65536)
    assert answer[9:12] in allowed
    assert b"set-cookie" not in answer.lower()
    assert b"Traceback" not in answer
    assert target.is_ready()


def test_slow_and_silent_clients_hold_up_nobody(target: Running) -> None:
    silent = [socket.create_connection(("127.0.0.1", target.port)) for _ in range(50)]
    try:
        for number, connection in enumerate(silent):
            connection.sendall(b"POST /chat HTTP/1.1\r\nhost: x\r\n"[: number + 1])
        assert target.ask("POST", "/chat", {"message": "hi"}, JSON).status == 200
    finally:
        for connection in silent:
            connection.close()
    assert target.is_ready()
