"""Load, timing and failures, against a server that breaks HTTP on purpose."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.bench.client import Sample, parse_endpoint
from quantize.bench.load import arrivals, percentile, summarize
from quantize.bench.prompts import SHAPES, Shape, TokenRule, parse_shape, prompt
from quantize.bench.result import BenchResult
from quantize.bench.session import LoadSettings, bench_url, context_for
from quantize.errors import BenchError, UsageError
from quantize.events import ListReporter
from tests.bench.servers import FakeServer, serving

QUICK = Shape("quick", 30, 4)


def measure(server: FakeServer, path: str = "", **settings: object) -> BenchResult:
    """Bench a server with quick settings."""
    values: dict[str, object] = {"shapes": (QUICK,), "concurrencies": (1,), "requests": 8, "warm_up": 0, "timeout": 1.0}
    endpoint = parse_endpoint(server.url + path, headers={}, extra={})
    return bench_url(endpoint, LoadSettings(**{**values, **settings}), ListReporter())  # type: ignore[arg-type]


def test_every_tenth_is_dropped_and_every_twentieth_stalls() -> None:
    def behaviour(number: int) -> str:
        return "stall" if number % 20 == 0 else "drop" if number % 10 == 0 else "ok"

    with serving(FakeServer(behaviour)) as server:
        result = measure(server, requests=40, concurrencies=(1, 4))
    assert [(cell.requests, cell.succeeded) for cell in result.cells] == [(40, 36), (40, 36)]
    for cell in result.cells:
        assert cell.errors == {"dropped": 2, "stall": 2}
        assert cell.error_rate == pytest.approx(0.1)
    assert result.errors == {"dropped": 4, "stall": 4}
    assert result.error_rate == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("drop", "dropped"),
        ("hang", "timeout"),
        ("stall", "stall"),
        ("pings", "stall"),
        ("503", "status 503"),
        ("429", "status 429"),
        ("cut", "broken stream"),
        ("unfinished", "broken stream"),
        ("html", "malformed"),
        ("garbage", "malformed"),
        ("list", "malformed"),
        ("no choices", "malformed"),
        ("error event", "error event"),
    ],
)
def test_a_failure_has_its_kind(how: str, kind: str) -> None:
    with serving(FakeServer(lambda number: how if number == 2 else "ok")) as server:
        cell = measure(server, requests=3).cells[0]
    assert cell.errors == {kind: 1}
    assert (cell.succeeded, cell.requests) == (2, 3)
    assert list(cell.error_examples) == [kind]


def test_a_server_that_goes_away_is_no_connection() -> None:
    with serving(FakeServer(lambda number: "leave" if number == 3 else "ok")) as server:
        result = measure(server, requests=5)
    assert result.errors == {"connect": 2}
    assert result.succeeded == 3


def test_a_server_that_is_not_there() -> None:
    endpoint = parse_endpoint("http://127.0.0.1:9", headers={}, extra={})
    with pytest.raises(BenchError, match=r"no server at http://127\.0\.0\.1:9/v1"):
        bench_url(endpoint, LoadSettings(), ListReporter())


def test_times_are_those_of_the_server() -> None:
    with serving(FakeServer(tokens=6, token_seconds=0.03)) as server:
        cell = measure(server, requests=6).cells[0]
    assert cell.first_token is not None
    assert cell.latency is not None
    assert cell.token_gap is not None
    assert 0.03 <= cell.first_token.p50 < 0.3
    assert 0.18 <= cell.latency.p50 < 0.9
    assert 0.03 <= cell.token_gap.p50 < 0.15
    assert cell.output_tokens_per_second == pytest.approx(6 * cell.requests_per_second, rel=1e-4)
    assert cell.requests_per_second == pytest.approx(6 / cell.seconds, rel=1e-4)


def test_prompts_are_as_long_as_asked_and_all_different() -> None:
    with serving(FakeServer()) as server:
        result = measure(server, shapes=(Shape("a", 100, 4), Shape("b", 40, 4)), concurrencies=(2,))
    assert [cell.mean_prompt_tokens for cell in result.cells] == [100, 40]  # the server counts 10 and 2 a word
    texts = [body["messages"][0]["content"] for body in server.bodies]
    assert len(set(texts)) == len(texts) == 16
    assert len({text[:12] for text in texts}) > 8  # no shared start that a prefix cache would keep
    assert result.tokens_counted_by == "usage"
    assert result.measured_with.model == "model-1"
    assert result.measured_with.server == "fake/1.0"


def test_without_a_count_pieces_are_counted() -> None:
    with serving(FakeServer(tokens=5, usage=False)) as server:
        result = measure(server)
    assert result.tokens_counted_by == "chunks"
    assert result.cells[0].mean_output_tokens == 5
    assert result.cells[0].mean_prompt_tokens is None


def test_a_server_that_knows_no_stream_options_is_not_sent_any() -> None:
    with serving(FakeServer(tokens=5, usage=False, strict=True)) as server:
        result = measure(server)
    assert (result.errors, result.cells[0].mean_output_tokens) == ({}, 5)
    assert not any("stream_options" in body for body in server.bodies)


def test_the_warm_up_is_not_measured() -> None:
    with serving(FakeServer(lambda number: "503" if number <= 3 else "ok")) as server:
        result = measure(server, warm_up=3)
    assert (result.warm_up_requests, result.requests, result.errors) == (3, 8, {})
    assert server.requests == 11
    assert server.bodies[0]["messages"] != server.bodies[3]["messages"]


def test_concurrency_is_kept() -> None:
    with serving(FakeServer(token_seconds=0.02)) as server:
        one, four = measure(server, concurrencies=(1, 4), requests=12).cells
    assert four.requests_per_second > 1.8 * one.requests_per_second


def test_an_open_loop_shows_the_queue_that_a_closed_one_hides() -> None:
    slow = {"tokens": 2, "token_seconds": 0.02, "one_at_a_time": True}
    with serving(FakeServer(**slow)) as server:  # type: ignore[arg-type]
        closed = measure(server, requests=20, timeout=5.0).cells[0]
    with serving(FakeServer(**slow)) as server:  # type: ignore[arg-type]
        result = measure(server, requests=20, rates=(100.0,), timeout=5.0)
    opened = result.cells[0]
    assert result.loop == "open"
    assert (opened.concurrency, opened.rate, opened.errors) == (None, 100.0, {})
    assert closed.latency is not None
    assert opened.latency is not None
    assert opened.latency.p50 > 3 * closed.latency.p50  # 25 a second are served, 100 a second arrive
    assert opened.requests_per_second < 30


def test_no_request_is_begun_after_the_time_is_up() -> None:
    with serving(FakeServer(tokens=2, token_seconds=0.05)) as server:
        cell = measure(server, requests=500, max_seconds=0.3).cells[0]
    assert 1 <= cell.requests <= 4
    assert cell.succeeded == cell.requests


def test_a_chat_endpoint_is_timed_as_a_whole() -> None:
    with serving(FakeServer(lambda number: "html" if number == 3 else "ok", token_seconds=0.01)) as server:
        result = measure(server, "/chat", requests=5)
    cell = result.cells[0]
    assert (result.api, cell.errors, cell.first_token, cell.token_gap) == ("chat", {"malformed": 1}, None, None)
    assert cell.latency is not None
    assert cell.latency.p50 >= 0.04
    assert cell.mean_output_tokens == 4
    assert set(server.bodies[0]) == {"message", "system", "temperature", "max_tokens"}


def test_the_fake_server_speaks_the_protocol() -> None:
    """Or it would prove nothing: OpenAI's own client reads its stream."""
    with (
        serving(FakeServer(tokens=3)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
    ):
        messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]
        stream = client.chat.completions.create(model="m", messages=messages, stream=True, max_tokens=3)
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "w w w "
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=60), st.sampled_from([0.5, 0.95, 0.99]))
def test_percentiles_are_the_nearest_rank(values: list[float], share: float) -> None:
    assert percentile(values, share) == float(np.quantile(values, share, method="inverted_cdf"))


def test_arrivals_are_a_poisson_process() -> None:
    times = arrivals(20_000, 10.0, seed=3)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.1, rel=0.03)  # as long as the mean: exponential
    assert arrivals(5, 10.0, seed=3) == times[:5]


def test_a_cell_without_success_has_no_times() -> None:
    cell = summarize(QUICK, [Sample(0.0, ended=1.0, error="timeout")], concurrency=1, rate=None)
    assert (cell.latency, cell.output_tokens_per_second, cell.error_rate) == (None, None, 1.0)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://a", "http://", "http://a:99999", "http://a:port", "http://[::1"]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is no URL of a server"):
        parse_endpoint(url, headers={}, extra={})


@pytest.mark.parametrize(
    ("url", "posted"),
    [
        ("http://a:8000", "http://a:8000/v1/chat/completions"),
        ("http://a:8000/", "http://a:8000/v1/chat/completions"),
        ("https://a/v1", "https://a/v1/chat/completions"),
        ("https://a/openai/v1beta", "https://a/openai/v1beta/chat/completions"),
        ("https://a/v1/chat/completions", "https://a/v1/chat/completions"),
        ("http://a:8000/chat", "http://a:8000/chat"),
        ("http://a/inner/chat/", "http://a/inner/chat"),
    ],
)
def test_a_url_means_an_endpoint(url: str, posted: str) -> None:
    assert parse_endpoint(url, headers={}, extra={}).url == posted


@pytest.mark.parametrize("text", ["", "medium", "10", "0:5", "5:0", "-1:4", "9999999:1", "1:2:3"])
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no shape"):
        parse_shape(text)


def test_shapes_and_prompts() -> None:
    assert [parse_shape(shape.name) for shape in SHAPES] == list(SHAPES)
    assert parse_shape("512:64") == Shape("512:64", 512, 64)
    rule = TokenRule.from_counts((2, 14), (20, 50))
    assert (rule.fixed, rule.a_word) == (10, 2)
    assert len(prompt(QUICK, 0, rule).split()) == 10
    assert prompt(QUICK, 1, rule) == prompt(QUICK, 1, rule) != prompt(QUICK, 1, rule, seed=1)
    assert context_for((Shape("a", 100, 20),)) == 256


@pytest.mark.parametrize("kind", ["reasoning", "tool_calls"])
def test_a_token_of_any_kind_is_the_first_and_an_answer_without_text_is_counted(kind: str) -> None:
    with serving(FakeServer(lambda number: "ok" if number == 3 else kind, tokens=4, token_seconds=0.05)) as server:
        (cell,) = measure(server).cells
    assert (cell.succeeded, cell.without_text) == (8, 7)
    assert cell.first_token is not None
    assert 0.05 <= cell.first_token.p50 < 0.15  # and not 0.2, when the answer is over
    assert cell.mean_output_tokens == 4
