"""A gateway in front of another server: a second gateway with a fake model, or a stub that misbehaves."""

from __future__ import annotations

import gzip
import http.server
import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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
    behind.wait(lambda: not behind.is_listening())
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
def stub(
    behaviour: Behaviour, tokenize: int | None = None, *, threads: bool = True, models: Any = ("fake",),
    pause: float = 0,
) -> Iterator[int]:  # fmt: skip
    """A server with these models, listed after a pause, whose answers a test writes by hand; models: or a status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(pause)
            if isinstance(models, int):
                self.answer(models, {})
            else:
                self.answer(200, {"data": [{"id": name} for name in models]})

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


WHOLE = {"model": "other", "choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}
ENDED = EVENT + b'data: {"model":"fake-2024","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'


@pytest.mark.parametrize(
    ("asked", "listed", "known"),
    [
        ("llama3.2", ["llama3.2:latest"], True),
        ("me/llama3.2", ["me/llama3.2:latest"], True),
        ("llama3.2:1b", ["llama3.2:latest", "llama3.2:1b"], True),
        ("llama3.2", ["llama3.2:1b"], False),
        ("llama3.2:latest", ["llama3.2"], False),
        ("llama3.2:1b", ["llama3.2:1b:latest"], False),
        ("any", 404, True),  # no list: the server answers, and is asked for what the user named
        (None, 404, False),
    ],
)
def test_a_model_is_known_by_the_name_that_its_server_resolves(
    start: Start, asked: str | None, listed: Any, known: bool
) -> None:
    with stub(sends(200, json.dumps(WHOLE).encode()), models=listed) as port:
        front = start(in_front_of(port, model=asked), rules=Rules("up"), ready=False)
        if known:
            front.wait(front.is_ready)
            assert front.chat("hi").json["model"] == "up"
        else:
            told = "has no model" if isinstance(listed, list) else "answers 404 to /models"
            front.wait(lambda: told in front.ask("GET", "/ready").json["reason"])


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_compressed_answer_is_read_whole_and_streamed(start: Start, coding: str, pack: Any) -> None:
    asked: list[str | None] = []

    def behave(handler: http.server.BaseHTTPRequestHandler) -> None:
        asked.append(handler.headers["accept-encoding"])
        body = ENDED + b"data: [DONE]\n\n" if streams else json.dumps(WHOLE).encode()
        sends(200, pack(body), content_encoding=coding)(handler)

    with stub(behave) as port:
        front = start(in_front_of(port), rules=Rules("up"))
        streams = False
        assert front.chat("hi").json["choices"][0]["message"]["content"] == "x"
        streams = True
        assert front.chat("hi", stream=True).events[0]["choices"][0]["delta"]["content"] == "hi"
    assert asked == ["identity", "identity"]


SHAPES = [
    {"error": {"message": "why not", "code": 400}},
    {"object": "error", "message": "why not", "code": 400},
    {"detail": "why not"},
    {"detail": [{"loc": ["body", "x"], "msg": "why not"}]},
    {"error": "why not"},
    {"message": "why not"},
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reason_of_a_refusal_goes_on_whatever_its_shape(start: Start, shape: Any, stream: bool) -> None:
    for status, told, code in ((400, 400, "upstream_refused"), (500, 502, "upstream_error")):
        with stub(sends(status, json.dumps(shape).encode())) as port:
            answer = start(in_front_of(port), rules=Rules("up")).chat("hi", stream=stream)
            assert (answer.status, answer.json["error"]["code"]) == (told, code)
            assert "why not" in answer.json["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("shape", "status"),
    [(SHAPES[0], 400), (SHAPES[1], 400), (SHAPES[4], 502), ({"error": {"message": "why not", "code": {}}}, 502)],
)
def test_an_error_that_comes_with_status_200(start: Start, shape: Any, status: int, stream: bool) -> None:
    whole = json.dumps(shape).encode()
    for body in [whole, b"data: " + whole + b"\n\n", b"data: " + whole + b"\n\ndata: [DONE]\n\n"][: 3 if stream else 1]:
        with stub(sends(200, body)) as port:
            answer = start(in_front_of(port), rules=Rules("up")).chat("hi", stream=stream)
            assert answer.status == status
            assert "why not" in answer.json["error"]["message"]


def test_an_error_in_the_middle_of_a_stream_ends_it_with_its_reason(start: Start) -> None:
    with stub(sends(200, EVENT + b'data: {"error": {"message": "why not"}}\n\n' + ENDED)) as port:
        events = start(in_front_of(port), rules=Rules("up")).chat("hi", stream=True).events
    assert [event.get("error", {}).get("message") for event in events] == [None, "the upstream failed: why not"]


def test_a_wrong_key_is_not_repeated(start: Start) -> None:
    with stub(sends(401, b'{"error": {"message": "Incorrect API key: sk-abc"}}')) as port:
        answer = start(in_front_of(port), rules=Rules("up")).chat("hi")
    assert (answer.status, b"sk-abc" in answer.body) == (502, False)


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_a_stream_that_is_finished_but_does_not_say_done(start: Start, cut: int) -> None:
    with stub(sends(200, ENDED[: len(ENDED) - cut])) as port:
        answer = start(in_front_of(port), rules=Rules("up")).chat("hi", stream=True)
    assert answer.events[-1] == "[DONE]"
    assert [event["model"] for event in answer.events[:-1]] == ["up", "up"]  # by whatever name the upstream has it
    assert answer.events[-2]["choices"][0]["finish_reason"] == "stop"


def test_only_the_models_name_is_renamed(start: Start) -> None:
    text = '{"model": "x"} "model": "y"'
    event = {"id": "1", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}], "model": 'a"b'}
    with stub(sends(200, f"data: {json.dumps(event)}\n\n".encode())) as port:
        front = start(in_front_of(port, name='u"p\\1'), rules=Rules('u"p\\1'))
        (chunk, _) = front.chat("hi", stream=True).events
    assert (chunk["choices"][0]["delta"]["content"], chunk["model"]) == (text, 'u"p\\1')


def test_a_list_of_models_may_take_its_time(start: Start) -> None:
    with stub(sends(200, json.dumps(WHOLE).encode()), pause=1.5) as port:
        front = start(in_front_of(port), rules=Rules("up"), ready=False)
        front.wait(front.is_ready)
        assert front.chat("hi").status == 200


@pytest.mark.parametrize("field", ["content", "reasoning", "reasoning_content"])
def test_the_first_token_is_one_of_any_kind_and_not_the_role(start: Start, field: str) -> None:
    def behave(handler: http.server.BaseHTTPRequestHandler) -> None:
        sends(200, b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n')(handler)
        handler.wfile.flush()
        time.sleep(0.3)
        handler.wfile.write(EVENT.replace(b"content", field.encode()) + ENDED)

    with stub(behave) as port:
        front = start(in_front_of(port), rules=Rules("up"))
        assert front.chat("hi", stream=True).events[-1] == "[DONE]"
        (line,) = [line for line in front.lines() if line.get("route") == "/v1/chat/completions"]
    assert line["first_token_seconds"] > 0.25


def test_embeddings_go_through(start: Start) -> None:
    behind = start(fakes(supports=["embeddings"]))
    front = start(in_front_of(behind.port), rules=Rules("up"))
    client = openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0)
    answer = client.embeddings.create(model="up", input=["a", "b c"])
    assert (len(answer.data), answer.model, answer.usage.prompt_tokens) == (2, "up", 3)


def test_an_event_may_come_in_pieces(start: Start) -> None:
    def behave(handler: http.server.BaseHTTPRequestHandler) -> None:
        sends(200, b"")(handler)
        for place in range(0, len(ENDED), 40):
            handler.wfile.write(ENDED[place : place + 40])
            handler.wfile.flush()
            time.sleep(0.01)

    with stub(behave) as port:
        events = start(in_front_of(port), rules=Rules("up")).chat("hi", stream=True).events
    assert [event if event == "[DONE]" else event["model"] for event in events] == ["up", "up", "[DONE]"]
