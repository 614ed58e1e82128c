"""A gateway in front of another server: a second gateway with a fake model, or a stub that misbehaves."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import openai
import pytest

from quantize.serve.engines.base import Engine
from quantize.serve.engines.fake import fake_engine
from quantize.serve.engines.upstream import UpstreamEngine
from quantize.serve.monitoring import Watcher
from quantize.serve.router import Rules
from quantize.serve.service import RequestLimits
from quantize.serve.targets import UpstreamTarget
from tests.serve.conftest import MakeEngines, Running, Start, fakes, keys_of


def in_front_of(port: int, *, model: str | None = "fake", key: str | None = None, name: str = "up") -> MakeEngines:
    target = UpstreamTarget(name, f"http://127.0.0.1:{port}/v1", model, key)
    return lambda watcher: {name: UpstreamEngine(target, watcher.about(name))}


@pytest.fixture
def pair(start: Start) -> tuple[Running, Running]:
    """The server behind, and the gateway in front."""
    behind = start(fakes(supports=["logprobs", "top_k"]))
    return behind, start(in_front_of(behind.port), rules=Rules("up"))


def test_the_openai_client_through_both(pair: tuple[Running, Running]) -> None:
    client = openai.OpenAI(base_url=f"{pair[1].url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "one two three"}]
    whole = client.chat.completions.create(model="up", messages=messages)  # type: ignore[call-overload]
    assert (whole.choices[0].message.content, whole.model) == ("one two three ", "up")
    chunks = list(client.chat.completions.create(model="up", messages=messages, stream=True))  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two three "
    assert {chunk.model for chunk in chunks} == {"up"}
    assert [model.id for model in client.models.list()] == ["up"]
    asked = client.completions.create(model="up", prompt="a b", stream=True, stream_options={"include_usage": True})
    assert [chunk.usage.completion_tokens for chunk in asked if chunk.usage] == [2]


def test_tokens_are_counted_though_the_client_did_not_ask(pair: tuple[Running, Running]) -> None:
    answer = pair[1].chat("one two three", stream=True)
    assert all(event == "[DONE]" or event.get("usage") is None for event in answer.events)
    assert b'quantize_tokens_out_total{model="up"} 3.0' in pair[1].ask("GET", "/metrics").body


def test_the_short_endpoints_work_through_an_upstream(pair: tuple[Running, Running]) -> None:
    assert pair[1].ask("POST", "/chat", {"message": "hi you"}).json["answer"] == "hi you "
    assert pair[1].ask("POST", "/v1/generate", {"prompt": "hi you"}).json["answer"] == "hi you "


def test_what_the_upstream_knows_goes_through_and_its_refusals_come_back(pair: tuple[Running, Running]) -> None:
    refused = pair[1].chat("hi", grammar="x")
    assert (refused.status, refused.json["error"]["code"]) == (422, "upstream_refused")
    assert "grammar is not supported" in refused.json["error"]["message"]


def test_a_client_that_goes_away_stops_the_upstream_too(start: Start) -> None:
    behind = start(fakes(delay=0.01))
    front = start(in_front_of(behind.port), rules=Rules("up"))
    body = json.dumps({"messages": [{"role": "user", "content": "forever!"}], "stream": True, "max_tokens": 500})
    with socket.create_connection(("127.0.0.1", front.port)) as client:
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
        client.sendall(f"{head}{len(body)}\r\n\r\n{body}".encode())
        assert b"200 OK" in client.recv(4096)
        assert behind.ask("GET", "/health").json["active_requests"] == 1
    assert behind.wait(lambda: behind.ask("GET", "/health").json["active_requests"] == 0) < 1


def test_ready_follows_the_upstream_within_two_seconds_both_ways(start: Start) -> None:
    behind = start(fakes())
    port = behind.port
    front = start(in_front_of(port), rules=Rules("up"))
    behind.server.should_exit = True
    stopped = time.monotonic()
    front.wait(lambda: not front.is_ready())
    assert time.monotonic() - stopped < 2
    assert f"127.0.0.1:{port} does not answer" in front.ask("GET", "/ready").json["reason"]
    assert front.chat("hi").status == 503
    behind.wait(lambda: not behind.server.started or not behind.server.servers[0].is_serving())
    again = start(fakes(), port=port)
    back = time.monotonic()
    front.wait(front.is_ready)
    assert time.monotonic() - back < 2
    assert front.chat("hi").status == 200
    assert again.port == port


def test_a_server_that_does_one_thing_at_a_time_is_busy_not_away(start: Start) -> None:
    whole = json.dumps({"choices": [{"message": {"content": "x"}}]}).encode()

    def slow(handler: http.server.BaseHTTPRequestHandler) -> None:
        time.sleep(3)
        sends(200, whole)(handler)

    with stub(slow, threads=False) as port:
        front = start(in_front_of(port), rules=Rules("up"))
        thread = threading.Thread(target=front.chat, args=("hi",))
        thread.start()
        while thread.is_alive():
            assert front.is_ready()
            time.sleep(0.1)
        assert front.is_ready()


def test_a_missing_model_and_a_wrong_key_are_told(start: Start, tmp_path_factory: pytest.TempPathFactory) -> None:
    behind = start(fakes(), keys=keys_of(tmp_path_factory.mktemp("keys"), front="front-key-0123456789"))
    good = start(in_front_of(behind.port, model=None, key="front-key-0123456789"), rules=Rules("up"))
    assert good.chat("hi").status == 200
    wrong = start(in_front_of(behind.port, key="wrong"), rules=Rules("up"), ready=False)
    wrong.wait(lambda: "answers 401" in wrong.ask("GET", "/ready").json["reason"])
    other = start(in_front_of(behind.port, model="x", key="front-key-0123456789"), rules=Rules("up"), ready=False)
    other.wait(lambda: "has no model x" in other.ask("GET", "/ready").json["reason"])


Behaviour = Callable[[http.server.BaseHTTPRequestHandler], None]


@contextmanager
def stub(behaviour: Behaviour, tokenize: int | None = None, *, threads: bool = True) -> Iterator[int]:
    """A server with one model, whose answers a test writes by hand."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, {"data": [{"id": "fake"}]})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            if self.path == "/tokenize" and tokenize is not None:
                self.answer(200, {"count": tokenize})
            elif self.path == "/tokenize":
                self.answer(404, {})
            else:
                behaviour(self)

        def answer(self, status: int, data: object) -> None:
            body = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    kind = http.server.ThreadingHTTPServer if threads else http.server.HTTPServer
    server = kind(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def sends(status: int, body: bytes, **headers: str) -> Behaviour:
    def behave(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return behave


def hangs(handler: http.server.BaseHTTPRequestHandler) -> None:
    time.sleep(1.5)


EVENT = b'data: {"model": "fake", "choices": [{"index": 0, "delta": {"content": "hi"}}]}\n\n'


@pytest.mark.parametrize(
    ("behaviour", "stream", "status", "code"),
    [
        (sends(500, b"oops"), False, 502, "upstream_error"),
        (sends(500, b"oops"), True, 502, "upstream_error"),
        (sends(401, b"{}"), False, 502, "upstream_error"),
        (sends(429, b"{}", retry_after="7"), False, 429, "upstream_refused"),
        (sends(200, b"<html>"), False, 502, "upstream_invalid"),
        (sends(200, b'{"no": "choices"}'), False, 502, "upstream_invalid"),
        (sends(200, b""), True, 502, "upstream_broke_off"),
        (sends(200, b"{", content_length="9"), False, 502, "upstream_unreachable"),
        (hangs, False, 504, "timeout"),
        (hangs, True, 504, "timeout"),
    ],
)
def test_an_upstream_that_fails(start: Start, behaviour: Behaviour, stream: bool, status: int, code: str) -> None:
    with stub(behaviour) as port:
        front = start(in_front_of(port), rules=Rules("up"), limits=RequestLimits(timeout_seconds=0.5))
        answer = front.chat("hi", stream=stream)
        assert (answer.status, answer.json["error"]["code"]) == (status, code)
        assert answer.headers.get("retry-after") == ("7" if status == 429 else None)


@pytest.mark.parametrize("body", [EVENT, EVENT + EVENT[:40], EVENT.replace(b"\n", b"\r\n")])
def test_a_stream_that_breaks_off_ends_with_an_error_and_never_with_half_an_event(start: Start, body: bytes) -> None:
    with stub(sends(200, body)) as port:
        front = start(in_front_of(port), rules=Rules("up"))
        answer = front.chat("hi", stream=True)
        assert answer.status == 200
        assert [event.get("error", {}).get("code") for event in answer.events] == [None, "upstream_broke_off"]
        assert answer.events[0]["model"] == "up"


def test_a_failing_upstream_falls_back_to_a_local_model(start: Start) -> None:
    with stub(sends(500, b"oops")) as port:

        def make(watcher: Watcher) -> Mapping[str, Engine]:
            return {**in_front_of(port)(watcher), "local": fake_engine("local", watcher.about("local"))}

        front = start(make, rules=Rules("up", fallback="local"))
        assert front.chat("hi").json["model"] == "local"
        assert front.chat("hi", stream=True).events[0]["model"] == "local"


@pytest.mark.parametrize(("count", "status"), [(5, 200), (6, 413), (None, 502)])
def test_the_input_limit_is_held_by_the_upstreams_tokenizer(start: Start, count: int | None, status: int) -> None:
    whole = json.dumps({"choices": [{"message": {"content": "x"}}]}).encode()
    with stub(sends(200, whole), tokenize=count) as port:
        front = start(in_front_of(port), rules=Rules("up"), limits=RequestLimits(max_input_tokens=5))
        assert front.chat("hi").status == status
