"""One client sends the worst that is known; five others stream meanwhile, and lose nothing by it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from quantize.runtimes.served import Serving
from tests.serve.conftest import JSON, Running, gguf_gateway
from tests.serve.json_schemas import WORST
from tests.serve.rewritten import rewritten

pytest.importorskip("llama_cpp")

STREAMS, TOKENS = 5, 60
STALL_SECONDS = 8.0  # between two events of a stream, on a machine that is busy with all this
# A template that does what the message says: models come with such, and some do it for some messages only.
TEMPLATE = """
{%- macro again() %}{{ again() }}{% endmacro -%}
{%- set asked = messages[0].content -%}
{%- if asked == 'divide' %}{{ 1 // 0 }}{% endif -%}
{%- if asked == 'recurse' %}{{ again() }}{% endif -%}
{%- if asked == 'double' %}{% set all = namespace(s='x' * 1000) %}
    {%- for i in range(40) %}{% set all.s = all.s + all.s %}{% endfor %}{{ all.s }}{% endif -%}
{%- if asked == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}
    {%- endfor %}{% endfor %}{% endfor %}{% endif -%}
{{ asked }}"""
GRAMMARS = {
    "no token": 'root ::= "\\x80" [\\uD800-\\uDFFF]',
    "nothing": "root ::= [a] [^\\x00-\\U0010FFFF]",
    "left": 'root ::= root "a" | "b"',
    "deep": "root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000,
    "counted": "root ::= ((((((" + '"a"?' + "){0,40}){0,40}){0,40}){0,40}){0,40}){0,40}",
    "ways": 'root ::= a a a a a a a a a a a a\na ::= ("x" | "xx" | "xxx" | b)*\nb ::= ("x" | "xx")+',
    "token": "root ::= <[999999]>",
}


@pytest.fixture(scope="module")
def gateway(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    file = rewritten(weights, tmp_path_factory.mktemp("hostile") / "model.gguf", template=TEMPLATE)
    with gguf_gateway(file, Serving(256, STREAMS + 1, threads=1), queue=8) as running:
        yield running


@dataclass
class Reader:
    """A client that streams one answer after the other, until it is told to stop."""

    port: int
    number: int
    whole: int = 0
    problems: list[str] = field(default_factory=list)
    longest: float = 0.0

    def run(self, over: threading.Event) -> None:
        while not over.is_set() or not self.whole:
            self._stream()
            if self.problems:
                return

    def _stream(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = {"prompt": f"{self.number} fox", "max_tokens": TOKENS, "stream": True, "seed": 1,
                "stream_options": {"include_usage": True}}  # fmt: skip
        events: list[str] = []
        try:
            connection.request("POST", "/v1/completions", json.dumps(body).encode(), JSON)
            response, before = connection.getresponse(), time.monotonic()
            for line in response:
                if line.startswith(b"data: "):
                    now = time.monotonic()
                    self.longest, before = max(self.longest, now - before), now
                    events.append(line[6:].decode().strip())
        except OSError as exc:
            events.append(repr(exc))
        finally:
            connection.close()
        finish = [choice["finish_reason"] for event in events[:-1] if event.startswith("{")
                  for choice in json.loads(event).get("choices", [])]  # fmt: skip
        if events[-1:] == ["[DONE]"] and finish[-1] in ("stop", "length") and not any("error" in e for e in events):
            self.whole += 1
        else:
            self.problems.append(" / ".join(events[-3:]))


def hostile() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """A name, a path, a body."""
    for name, schema in WORST.items():
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        yield name, "/v1/chat/completions", {**said("hi"), "response_format": form, "stream": "bound" in name}
    for name in ("divide", "recurse", "double", "loop"):
        yield name, "/v1/chat/completions", said(name)
    for name, grammar in GRAMMARS.items():
        yield name, "/v1/completions", {"prompt": "x", "grammar": grammar, "max_tokens": 40}
    yield "one long word", "/v1/completions", {"prompt": "a" * 300_000}
    yield "spaces", "/v1/completions", {"prompt": " " * 1_500_000}
    yield "long", "/v1/chat/completions", said("!" * 300_000)


def said(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 40}


def test_five_streams_lose_nothing_to_the_worst_of_requests(gateway: Running) -> None:
    readers, over = [Reader(gateway.port, number) for number in range(STREAMS)], threading.Event()
    threads = [threading.Thread(target=reader.run, args=(over,)) for reader in readers]
    engine: Any = gateway.gateway.service.router.engines["tiny"]
    pid = engine.pid
    for thread in threads:
        thread.start()
    answers = {}
    try:
        for name, path, body in hostile():
            answers[name] = gateway.ask("POST", path, body)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert [reader.problems for reader in readers] == [[]] * STREAMS
    assert all(reader.whole for reader in readers)
    assert max(reader.longest for reader in readers) < STALL_SECONDS
    assert engine.pid == pid
    assert [line for line in gateway.lines() if line["event"] in ("engine_died", "internal_error")] == []
    bad = {name: (item.status, item.body[:200]) for name, item in answers.items() if item.status not in (200, 413, 422)}
    assert bad == {}
    for name in ("divide", "recurse", "double", "loop"):
        assert (answers[name].status, answers[name].json["error"]["param"]) == (422, "messages")
    for name in ("what never ends", "many ways", "a pattern that backtracks", "a ring of references"):
        assert answers[name].status == 422
        assert answers[name].json["error"]["param"] == "response_format"
    for name in ("left", "deep", "counted", "token"):
        assert (answers[name].status, answers[name].json["error"]["param"]) == (422, "grammar")
    assert gateway.chat("well").status == 200


def test_a_schema_that_was_refused_for_its_time_is_refused_at_once(gateway: Running) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": WORST["a pattern that backtracks"]}}
    gateway.chat("hi", response_format=form)
    started = time.monotonic()
    assert gateway.chat("hi", response_format=form).status == 422
    assert time.monotonic() - started < 2
