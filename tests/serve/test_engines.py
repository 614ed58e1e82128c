"""Engines that load, crash, hang, run out of memory, or lose their client; and who answers instead."""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from quantize.runtimes.detokenizer import BytePieces
from quantize.serve.engines.base import Engine
from quantize.serve.engines.fake import fake_engine, fake_target
from quantize.serve.engines.local import LocalEngine
from quantize.serve.monitoring import Watcher
from quantize.serve.router import Rules
from quantize.serve.service import RequestLimits
from tests.serve.conftest import MakeEngines, Running, Start, fakes


def in_a_process(**options: Any) -> MakeEngines:
    return lambda watcher: {"fake": LocalEngine(fake_target("fake", **options), watcher.about("fake"))}


def process_of(gateway: Running) -> LocalEngine:
    engine = gateway.gateway.service.router.engines["fake"]
    assert isinstance(engine, LocalEngine)
    return engine


def test_loading_is_told_with_percent_and_refuses_meanwhile(start: Start) -> None:
    gateway = start(fakes(load_seconds=0.6), ready=False)
    assert gateway.ask("GET", "/health").status == 200
    seen = set()
    while (answer := gateway.ask("GET", "/ready")).status == 503:
        seen.add(answer.json["models"]["fake"]["percent"])
        assert answer.json["reason"].startswith("fake: ")
        refused = gateway.chat("hi")
        assert refused.status in (200, 503)
        if refused.status == 503:
            assert "retry-after" in refused.headers
    assert len(seen) > 2


def test_an_answer_that_can_not_be_written_ends_alone(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    written = BytePieces.add

    def add(self: BytePieces, token: int) -> str:
        text = written(self, token)
        if text.startswith("broken"):
            raise Exception("Invalid prefix encountered while decoding stream")
        return text

    monkeypatch.setattr(BytePieces, "add", add)
    gateway = start(fakes(delay=0.02, slots=2))
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(gateway.chat, "one two three four five six seven eight nine ten")
        failed = gateway.chat("one broken two")
        assert (failed.status, failed.json["error"]["code"]) == (503, "engine_failed")
        assert beside.result().json["choices"][0]["message"]["content"].endswith("nine ten ")
    assert gateway.is_ready()
    assert gateway.chat("one two").json["choices"][0]["message"]["content"] == "one two "


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("chat/completions", {"tools": [TOOL]}),
        ("chat/completions", {"tools": [TOOL], "tool_choice": "required"}),
        ("chat/completions", {"tools": [TOOL], "stream": True}),
        ("chat/completions", {"response_format": {"type": "json_object"}}),
        ("completions", {"prompt": "hi", "top_k": 3}),
        ("embeddings", {"input": "hi"}),
    ],
)
def test_what_a_model_can_do_is_not_judged_before_it_is_loaded(
    start: Start, path: str, fields: dict[str, object]
) -> None:
    gateway = start(fakes(load_seconds=9), ready=False)
    messages = {"messages": [{"role": "user", "content": "hi"}]} if path.startswith("chat") else {}
    answer = gateway.ask("POST", f"/v1/{path}", {"model": "fake", **messages, **fields})
    assert (answer.status, answer.json["error"]["code"]) == (503, "model_not_ready")
    assert "retry-after" in answer.headers


def test_a_killed_process_is_told_and_started_again(start: Start) -> None:
    gateway = start(in_a_process())
    assert gateway.chat("hi there").json["choices"][0]["message"]["content"] == "hi there "
    pid = process_of(gateway).pid
    assert pid is not None
    assert pid != os.getpid()
    os.kill(pid, signal.SIGKILL)
    assert gateway.wait(lambda: not gateway.is_ready()) < 2
    reasons: list[str] = []

    def told() -> bool:
        reasons.append(gateway.ask("GET", "/ready").json["reason"])
        return "SIGKILL" in reasons[-1]

    gateway.wait(told)  # for a moment only that it ended is known, not how
    assert "starting again" in reasons[-1]
    assert "SIGKILL" in gateway.chat("hi").json["error"]["message"]
    gateway.wait(gateway.is_ready)
    assert gateway.chat("hi again").status == 200
    assert [line["model"] for line in gateway.lines() if line["event"] == "engine_died"] == ["fake"]


def test_a_crash_while_answering_is_a_503_for_that_request_only(start: Start) -> None:
    gateway = start(in_a_process())
    answer = gateway.chat("crash!")
    assert (answer.status, answer.json["error"]["code"]) == (503, "engine_crashed")
    gateway.wait(gateway.is_ready)
    assert gateway.chat("well").status == 200


def test_the_last_words_of_a_library_are_told_and_nothing_else(start: Start) -> None:
    gateway = start(in_a_process())
    assert gateway.chat("abort!").status == 503
    gateway.wait(gateway.is_ready)
    (died,) = [line for line in gateway.lines() if line["event"] == "engine_died"]
    assert died["reason"].startswith(
        "the model's process was ended by SIGABRT: a library gave up (fake.c:1: GGML_ASSERT(all is well) failed); if "
    )
    assert "a line with the prompt" not in gateway.log.getvalue().decode()


def test_what_does_not_load_is_told_and_not_tried_for_ever(start: Start) -> None:
    gateway = start(fakes(refuse="the file is damaged"), ready=False)
    gateway.wait(lambda: gateway.ask("GET", "/ready").json["models"]["fake"]["state"] == "failed")
    assert gateway.ask("GET", "/ready").json["reason"] == "fake: the file is damaged"
    assert gateway.ask("GET", "/health").status == 200


def test_a_process_that_hangs_does_not_look_ready_for_long(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.serve.engines.link.PING_SECONDS", 0.1)
    monkeypatch.setattr("quantize.serve.engines.link.HANG_SECONDS", 0.4)
    gateway = start(in_a_process(delay=0.01))
    assert gateway.chat("word " * 80).status == 200  # long, but not stuck
    assert gateway.chat("stuck!").status == 503
    assert [line["reason"] for line in gateway.lines() if line["event"] == "engine_died"] == [
        "the model's process did not answer for 0.4 s"
    ]
    gateway.wait(gateway.is_ready)
    assert gateway.chat("well").status == 200


def test_a_process_that_can_not_be_started_is_told(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.serve.engines.link.FIRST_PAUSE", 0.05)

    async def launch() -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    def engines(watcher: Watcher) -> Mapping[str, Engine]:
        return {"fake": LocalEngine(fake_target("fake"), watcher.about("fake"), launch)}

    gateway = start(engines, ready=False)
    gateway.wait(lambda: gateway.ask("GET", "/ready").json["models"]["fake"]["state"] == "failed")
    assert gateway.ask("GET", "/ready").json["reason"].endswith("does not start: Cannot allocate memory")


def test_a_timeout_is_a_504_and_frees_the_slot(start: Start) -> None:
    gateway = start(fakes(slots=1), limits=RequestLimits(timeout_seconds=0.3, concurrency=1, queue=0))
    assert gateway.chat("hang!").status == 504
    stream = gateway.chat("first hang!", stream=True)
    assert stream.status == 200
    assert stream.events[-1]["error"]["code"] == "timeout"
    assert gateway.chat("fine").status == 200


def test_out_of_memory_is_a_503_that_says_so(start: Start) -> None:
    gateway = start(fakes())
    answer = gateway.chat("oom!")
    assert (answer.status, answer.json["error"]["code"]) == (503, "out_of_memory")
    assert gateway.chat("fine").status == 200


def two(first: Mapping[str, object], second: Mapping[str, object] | None = None) -> MakeEngines:
    def make(watcher: Watcher) -> Mapping[str, Engine]:
        return {
            "a": fake_engine("a", watcher.about("a"), **first),
            "b": fake_engine("b", watcher.about("b"), **(second or {})),
        }

    return make


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({"refuse": "damaged"}, RequestLimits()),
        ({"load_seconds": 9}, RequestLimits()),
        ({"delay": 0.6}, RequestLimits(timeout_seconds=0.3)),
    ],
    ids=["not loaded", "loading", "timeout"],
)
def test_the_fallback_answers_and_says_so(
    start: Start, options: Mapping[str, object], limits: RequestLimits, stream: bool
) -> None:
    gateway = start(two(options), rules=Rules("a", fallback="b"), limits=limits, ready=False)
    gateway.wait(lambda: gateway.ask("GET", "/ready").json["models"]["b"]["state"] == "ready")
    if "delay" in options:
        gateway.wait(lambda: gateway.ask("GET", "/ready").json["models"]["a"]["state"] == "ready", 15)
    answer = gateway.chat("one two", model="a", stream=stream)
    told = answer.events[0]["model"] if stream else answer.json["model"]
    assert (answer.status, told) == (200, "b")
    assert gateway.is_ready()
    assert b'quantize_fallbacks_total{by="b",model="a"} 1.0' in gateway.ask("GET", "/metrics").body


def test_out_of_memory_falls_back_and_a_wrong_request_does_not(start: Start) -> None:
    gateway = start(two({"supports": []}), rules=Rules("a", fallback="b"))
    assert gateway.chat("one", model="a", logprobs=True).status == 422
    oom = gateway.chat("oom!", model="a")
    assert oom.status == 503  # b was asked too: it obeys the same word
    assert b'quantize_fallbacks_total{by="b",model="a"} 1.0' in gateway.ask("GET", "/metrics").body


def test_a_canary_gets_its_share_of_the_default(start: Start) -> None:
    gateway = start(two({}), rules=Rules("a", canary=("b", 0.25)))
    seen = Counter(gateway.chat("hi").json["model"] for _ in range(200))
    assert 25 <= seen["b"] <= 75  # 50 expected; the bounds are four standard deviations away
    assert {gateway.chat("hi", model="b").json["model"] for _ in range(5)} == {"b"}


def test_a_client_that_goes_away_stops_the_generation(start: Start) -> None:
    gateway = start(fakes(delay=0.01), limits=RequestLimits(concurrency=1, queue=0))
    body = b'{"messages": [{"role": "user", "content": "forever!"}], "stream": true, "max_tokens": 500}'
    for wait_for in (b"forever!", b""):  # in the middle of a stream, and before anything came
        with socket.create_connection(("127.0.0.1", gateway.port)) as client:
            head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
            client.sendall(head.encode() + str(len(body)).encode() + b"\r\n\r\n" + body)
            received = b""
            while wait_for not in received:
                received += client.recv(4096)
            gateway.wait(lambda: gateway.ask("GET", "/health").json["active_requests"] == 1)
        assert gateway.wait(lambda: gateway.ask("GET", "/health").json["active_requests"] == 0) < 1
        assert gateway.chat("hi").status == 200
    assert [line["status"] for line in gateway.lines() if line["event"] == "request"] == [499, 200, 499, 200]


def test_answers_under_way_are_finished_before_the_end(start: Start) -> None:
    import threading

    gateway = start(fakes(delay=0.05))
    answers = []
    thread = threading.Thread(target=lambda: answers.append(gateway.chat("a b c d e f g h", stream=True)))
    thread.start()
    gateway.wait(lambda: gateway.ask("GET", "/health").json["active_requests"] == 1)
    gateway.server.should_exit = True
    thread.join()
    assert answers[0].events[-1] == "[DONE]"


def test_a_full_queue_is_a_429_with_the_seconds_to_wait(start: Start) -> None:
    from concurrent.futures import ThreadPoolExecutor

    gateway = start(fakes(delay=0.02, slots=2), limits=RequestLimits(concurrency=2, queue=3))
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: gateway.chat("a b c d e f g h i j"), range(24)))
    statuses = Counter(answer.status for answer in answers)
    assert set(statuses) == {200, 429}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status == 429)
    started = time.monotonic()
    assert gateway.chat("a").status == 200
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("rules", [Rules("x"), Rules("fake", fallback="x"), Rules("fake", canary=("x", 0.1))])
def test_rules_name_models_that_are_there(start: Start, rules: Rules) -> None:
    from quantize.errors import UsageError

    with pytest.raises(UsageError, match="'x' is not served here"):
        start(fakes(), rules=rules)
