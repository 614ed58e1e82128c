"""The gateway's own endpoints: shapes, states, trace ids, keys, rates, sizes, and the metrics that come of them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from quantize.serve.service import RequestLimits
from tests.serve.conftest import Running, Start, fakes, gateways, keys_of

SHAPE = {"answer", "model", "runtime", "latency_ms", "memory_rss_mb", "trace_id"}


def test_chat_in_its_shape(gateway: Running) -> None:
    answer = gateway.ask("POST", "/chat", {"message": "one two", "system": "zero", "temperature": 0, "max_tokens": 9})
    assert answer.status == 200
    assert set(answer.json) == SHAPE
    assert answer.json["answer"] == "zero one two "
    assert answer.json["trace_id"] == answer.headers["x-request-id"]
    assert answer.json["latency_ms"] > 0
    assert answer.json["memory_rss_mb"] > 10


def test_generate_in_its_shape(gateway: Running) -> None:
    answer = gateway.ask("POST", "/v1/generate", {"prompt": "one two three", "max_tokens": 2})
    assert set(answer.json) == SHAPE
    assert answer.json["answer"] == "one two "
    assert gateway.ask("POST", "/v1/generate", {"prompt": "x", "do_sample": False}).status == 200
    assert (
        gateway.ask("POST", "/v1/generate", {"prompt": "x", "do_sampel": False}).json["error"]["param"] == "do_sampel"
    )


def test_health_ready_and_models(gateway: Running) -> None:
    health = gateway.ask("GET", "/health").json
    assert (health["status"], health["active_requests"], health["waiting_requests"]) == ("ok", 0, 0)
    ready = gateway.ask("GET", "/ready")
    assert (ready.status, ready.json["status"], ready.json["reason"]) == (200, "ready", None)
    assert ready.json["models"]["fake"]["devices"] == {"cpu": 1}
    assert gateway.ask("GET", "/v1/models").json["data"][0]["default"] is True


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1.2:3_x", True), ("a" * 64, True), ("a" * 65, False), ("", False), ("a b", False), ("<x>", False)],
)
def test_a_sane_request_id_is_honoured(gateway: Running, given: str, kept: bool) -> None:
    answer = gateway.ask("POST", "/chat", {"message": "hi"}, {"x-request-id": given})
    assert (answer.headers["x-request-id"] == given) is kept
    assert answer.json["trace_id"] == answer.headers["x-request-id"]


def test_errors_have_the_trace_id_too(gateway: Running) -> None:
    for method, path, status in (("GET", "/nowhere", 404), ("DELETE", "/chat", 405), ("POST", "/chat", 400)):
        answer = gateway.ask(method, path, b"{", {"x-request-id": "mine"})
        assert (answer.status, answer.json["trace_id"], answer.headers["x-request-id"]) == (status, "mine", "mine")


def test_only_json_is_taken(gateway: Running) -> None:
    """A page of another site can send plain text without being asked first, but not JSON."""
    assert gateway.ask("POST", "/chat", b'{"message": "hi"}', {"content-type": "text/plain"}).status == 415


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    keys = keys_of(tmp_path_factory.mktemp("keys"), alice="alice-key-0123456789", bob="bob-key-0123456789")
    with gateways() as run:
        yield run(fakes(), keys=keys, limits=RequestLimits(requests_per_minute=3, max_body_bytes=500, body_seconds=0.3))


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic YTpi", "Bearer ", "bearer", "Bearer alice"])
@pytest.mark.parametrize(("method", "path"), [("POST", "/chat"), ("GET", "/v1/models"), ("POST", "/v1/nothing")])
def test_without_a_good_key_nothing_answers(guarded: Running, header: str | None, method: str, path: str) -> None:
    answer = guarded.ask(method, path, {"message": "hi"}, {"authorization": header} if header else {})
    assert (answer.status, answer.json["error"]["code"]) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/", "/docs", "/openapi.json"])
def test_what_needs_no_key(guarded: Running, path: str) -> None:
    assert guarded.ask("GET", path).status == 200


def test_each_key_has_its_own_rate(guarded: Running) -> None:
    def ask(key: str) -> int:
        return guarded.ask("POST", "/chat", {"message": "hi"}, {"authorization": f"Bearer {key}"}).status

    assert [ask("alice-key-0123456789") for _ in range(4)] == [200, 200, 200, 429]
    assert ask("bob-key-0123456789") == 200
    late = guarded.ask("GET", "/v1/models", headers={"authorization": "Bearer alice-key-0123456789"})
    assert 1 <= int(late.headers["retry-after"]) <= 20


def test_a_body_that_is_too_large(start: Start) -> None:
    small = start(fakes(), limits=RequestLimits(max_body_bytes=500, body_seconds=0.3))
    answer = small.ask("POST", "/chat", {"message": "x" * 600})
    assert (answer.status, answer.json["error"]["code"]) == (413, "body_too_large")
    with socket.create_connection(("127.0.0.1", small.port)) as connection:  # chunked: no length to look at
        head = b"POST /chat HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        connection.sendall(head + b"400\r\n" + b"x" * 1024 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    with socket.create_connection(("127.0.0.1", small.port)) as slow:  # a body that does not come
        slow.sendall(b"POST /chat HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{")
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
    assert small.is_ready()


def test_metrics_count_what_happened(start: Start) -> None:
    gateway = start(fakes())
    gateway.chat("one two three", stream=True)
    gateway.chat("one", temperature=9)
    families = {
        item.name: item for item in text_string_to_metric_families(gateway.ask("GET", "/metrics").body.decode())
    }

    def value(family: str, **labels: str) -> float:
        (found,) = [
            item.value for item in families[family].samples if item.labels == labels and "created" not in item.name
        ]
        return found

    route = "/v1/chat/completions"
    assert value("quantize_requests", route=route, status="200") == 1
    assert value("quantize_requests", route=route, status="422") == 1
    assert value("quantize_tokens_in", model="fake") == 3
    assert value("quantize_tokens_out", model="fake") == 3
    assert value("quantize_model_ready", model="fake") == 1
    assert value("quantize_queue_length", model="fake") == 0
    assert value("quantize_memory_rss_bytes", process="gateway") > 1e7
    first = [item for item in families["quantize_time_to_first_token_seconds"].samples if item.name.endswith("_count")]
    assert [item.value for item in first] == [1]


def test_the_edge_keeps_its_own_secrets(tmp_path: Path) -> None:
    """Keys are kept as hashes: no field of the object has one."""
    keys = keys_of(tmp_path, alice="alice-key-0123456789")
    assert "alice-key" not in repr(vars(keys))
    assert "alice-key" not in (tmp_path / "keys").read_text()
