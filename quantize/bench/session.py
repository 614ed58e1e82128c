"""One bench run: look at the server, warm up, measure each cell, say with what.

In: LoadSettings and an Endpoint, or an artifact to start a server for. Out: BenchResult. Nothing is written here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import httpx2

from quantize.bench.client import Endpoint, Sample, ask, body_of, new_client
from quantize.bench.load import closed_loop, open_loop, summarize
from quantize.bench.prompts import SHAPES, Shape, TokenRule, prompt, prompts_hash, words_text
from quantize.bench.result import BenchResult, Cell, With
from quantize.bench.rss import MemoryWatch, is_local, listener
from quantize.bench.server import Kind, Server, running
from quantize.errors import BenchError, UsageError
from quantize.events import Reporter, note, progress, status
from quantize.store.artifact import Artifact
from quantize.store.manifest import tool_versions
from quantize.system.machine import describe_machine

CONCURRENCIES = (1, 4, 8)
OPEN_LOOP_CONCURRENCY = 8
PROBE_WORDS = (2, 20)
CONTEXT_MARGIN = 1.25
"""Prompts are cut by words: their length in tokens is not exact, and a chat template adds some."""


@dataclass(frozen=True)
class LoadSettings:
    """How to load a server.

    requests: for each cell; none is begun after max_seconds. rates: requests a second (open loop) in place of
    concurrencies (closed loop). timeout: seconds to wait for a token. warm_up: requests before each cell, not counted;
    None for as many as run at once.
    """

    shapes: tuple[Shape, ...] = SHAPES
    concurrencies: tuple[int, ...] = CONCURRENCIES
    rates: tuple[float, ...] = ()
    requests: int = 24
    max_seconds: float = 60.0
    warm_up: int | None = None
    timeout: float = 120.0
    seed: int = 0

    @property
    def loads(self) -> list[tuple[int | None, float | None]]:
        """(concurrency, rate) of each column; one of the two is None."""
        if self.rates:
            return [(None, rate) for rate in self.rates]
        return [(number, None) for number in self.concurrencies]

    def warm_up_requests(self, concurrency: int | None) -> int:
        """Requests to warm up a cell with."""
        return (concurrency or 1) if self.warm_up is None else self.warm_up


def bench_url(endpoint: Endpoint, settings: LoadSettings, reporter: Reporter) -> BenchResult:
    """Measure a server that runs. Raises BenchError: not there, or it does not answer as it should."""
    return asyncio.run(_Run(endpoint, settings, reporter, None).result())


def bench_artifact(
    artifact: Artifact, kind: Kind, settings: LoadSettings, reporter: Reporter, *, context: int | None, threads: int,
    extra: Mapping[str, Any],
) -> BenchResult:  # fmt: skip
    """Start a server for an artifact, measure it, stop it.

    context: tokens; None for what the shapes need. extra: further fields of each request.
    Raises UsageError, MissingExtraError, BenchError.
    """
    needed = context or context_for(settings.shapes)
    status(reporter, "", f"starting a server for {artifact.ref}")
    at_once = max(settings.concurrencies if not settings.rates else (OPEN_LOOP_CONCURRENCY,))
    with running(artifact, kind, context=needed, threads=threads, concurrency=at_once) as server:
        note(reporter, "", f"{server.name} was ready after {server.ready_seconds:.1f} s")
        return asyncio.run(_Run(replace(server.endpoint, extra=extra), settings, reporter, server).result())


def context_for(shapes: tuple[Shape, ...]) -> int:
    """Tokens of context that the longest shape takes, with a margin, rounded up to 256."""
    longest = max(shape.prompt_tokens + shape.output_tokens for shape in shapes)
    return -(-int(longest * CONTEXT_MARGIN + 64) // 256) * 256


class _Run:
    """One run against one endpoint."""

    def __init__(self, endpoint: Endpoint, settings: LoadSettings, reporter: Reporter, server: Server | None) -> None:
        self.endpoint, self.settings, self.reporter, self.server = endpoint, settings, reporter, server
        self.rule = TokenRule()
        self.warm_up_requests = 0
        self.counted: set[str] = set()
        self.software = ""

    async def result(self) -> BenchResult:
        async with new_client(self.endpoint, self.settings.timeout) as client:
            with MemoryWatch(self._pid()) as watch:
                await self._look(client)
                cells = await self._cells(client, watch)
                ram, vram = watch.ram(), watch.vram()
        settings = self.settings
        return BenchResult(
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
            api=self.endpoint.api,
            loop="open" if settings.rates else "closed",
            timeout_seconds=settings.timeout,
            warm_up_requests=self.warm_up_requests,
            requests_per_cell=settings.requests,
            max_seconds_per_cell=settings.max_seconds,
            seed=settings.seed,
            prompts_hash=prompts_hash(settings.shapes, settings.requests, self.rule, settings.seed),
            tokens_counted_by="usage" if self.counted == {"usage"} else "chunks" if "chunks" in self.counted else None,
            ready_seconds=round(self.server.ready_seconds, 3) if self.server else None,
            cells=cells,
            ram=ram,
            vram=vram,
            measured_with=self._with(),
        )

    async def _look(self, client: httpx2.AsyncClient) -> None:
        """Find out whether the server is there, which model it has, and how it counts tokens."""
        status(self.reporter, "", f"looking at {self.endpoint.root}")
        if self.endpoint.api == "openai" and not self.endpoint.model:
            self.endpoint = replace(self.endpoint, model=await self._first_model(client))
        if self.endpoint.api == "openai":
            await self._try_stream(client)
        few, many = PROBE_WORDS
        fewer = _prompt_tokens(await self._probe(client, words_text(few, "probe:few")))
        more = None
        with contextlib.suppress(BenchError):  # a context too short for it is found out by the shapes themselves
            more = _prompt_tokens(await self._probe(client, words_text(many, "probe:many")))
        if fewer is None:
            note(self.reporter, "", "the server does not count prompt tokens: the length of prompts is a guess")
        else:
            self.rule = TokenRule.from_counts((few, fewer), (many, more) if more else (0, 0))

    async def _try_stream(self, client: httpx2.AsyncClient) -> None:
        """Find out whether the server minds being asked for usage."""
        now, timeout = time.perf_counter(), self.settings.timeout
        sample = await ask(client, self.endpoint, words_text(1, "probe"), 1, due=now, timeout=timeout)
        if sample.error in ("status 400", "status 422"):
            self.endpoint = replace(self.endpoint, asks_usage=False)

    async def _first_model(self, client: httpx2.AsyncClient) -> str:
        reply = await self._request(client, "GET", f"{self.endpoint.root}/models", None)
        models = reply.get("data")
        names = [item.get("id") for item in models if isinstance(item, dict)] if isinstance(models, list) else []
        if not names or not isinstance(names[0], str):
            raise BenchError(f"{self.endpoint.root}/models lists no model", hint="name one with --model")
        if len(names) > 1:
            note(self.reporter, "", f"the server has {len(names)} models; {names[0]} is measured (see --model)")
        return names[0]

    async def _probe(self, client: httpx2.AsyncClient, text: str) -> dict[str, Any]:
        body = body_of(self.endpoint, text, 1, stream=False)
        return await self._request(client, "POST", self.endpoint.url, body)

    async def _request(
        self, client: httpx2.AsyncClient, method: str, url: str, body: dict[str, Any] | None
    ) -> dict[str, Any]:
        """The JSON object that a request gives. Raises BenchError that says what is wrong with the server."""
        try:
            async with asyncio.timeout(self.settings.timeout):
                response = await client.request(method, url, json=body)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as exc:
            hint = "start it first, or give an artifact and it is started for you"
            raise BenchError(f"no server at {self.endpoint.root}: {exc}", hint=hint) from exc
        except TimeoutError as exc:
            hint = "is it still loading? --timeout waits longer"
            raise BenchError(f"{url}: no answer within {self.settings.timeout:g} s", hint=hint) from exc
        except httpx2.HTTPError as exc:
            hint = "is this the server of a language model?"
            raise BenchError(f"{url}: {type(exc).__name__}: {exc}", hint=hint) from exc
        self.software = response.headers.get("server", self.software)
        if response.status_code != 200:
            raise BenchError(
                f"{url}: status {response.status_code}: {response.text[:200]}", hint=_status_hint(response)
            )
        try:
            reply = response.json()
        except ValueError as exc:
            raise BenchError(f"{url}: no JSON", hint="is this an OpenAI-compatible server?") from exc
        if not isinstance(reply, dict):
            raise BenchError(f"{url}: no JSON object", hint="is this an OpenAI-compatible server?")
        return reply

    async def _cells(self, client: httpx2.AsyncClient, watch: MemoryWatch) -> list[Cell]:
        cells: list[Cell] = []
        for shape in self.settings.shapes:
            for concurrency, rate in self.settings.loads:
                cells.append(await self._cell(client, watch, shape, concurrency, rate, first=not cells))
        return cells

    async def _cell(
        self, client: httpx2.AsyncClient, watch: MemoryWatch, shape: Shape, concurrency: int | None,
        rate: float | None, *, first: bool,
    ) -> Cell:  # fmt: skip
        settings = self.settings
        title = f"{shape.name} {f'x {concurrency}' if rate is None else f'{rate:g}/s'}"
        count = settings.warm_up_requests(concurrency)
        status(self.reporter, "", f"{title}: warming up")

        async def one(number: int, due: float) -> Sample:
            text = prompt(shape, number, self.rule, settings.seed)
            timeout = settings.timeout
            return await ask(client, self.endpoint, text, shape.output_tokens, due=due, timeout=timeout)

        warm = await closed_loop(
            lambda number, due: one(-1 - number, due), count, concurrency or 1, settings.max_seconds, _ignore
        )
        self.warm_up_requests += len(warm)
        if first:
            watch.mark("after warm-up")

        def finished(done: int) -> None:
            progress(self.reporter, "", f"{title}: requests", done, settings.requests)

        if rate is None:
            samples = await closed_loop(one, settings.requests, concurrency or 1, settings.max_seconds, finished)
        else:
            samples = await open_loop(one, settings.requests, rate, settings.max_seconds, settings.seed, finished)
        self.counted |= {_counted_by(item) for item in samples if item.error is None} - {""}
        return summarize(shape, samples, concurrency=concurrency, rate=rate)

    def _pid(self) -> int | None:
        if self.server is not None:
            return self.server.pid
        return listener(self.endpoint.port) if is_local(self.endpoint.host) else None

    def _with(self) -> With:
        server = self.server
        return With(
            server=server.name if server else self.software or "unknown",
            model=self.endpoint.model.rpartition("/")[2],
            runtime=server.runtime if server else {},
            context=server.context if server else None,
            threads=server.threads if server else None,
            concurrency=server.concurrency if server else None,
            client=" ".join(f"{name} {version}" for name, version in tool_versions(("httpx2",)).items()),
            **describe_machine(),
        )


def check_settings(settings: LoadSettings) -> None:
    """Raise UsageError where nothing would be measured."""
    if settings.requests < 1 or not settings.shapes or not settings.loads:
        raise UsageError("nothing to measure", hint="give at least one shape, one concurrency and one request")


def _prompt_tokens(reply: Mapping[str, Any]) -> int | None:
    """Tokens of a prompt, as the server counts them: OpenAI's `usage`, or the same field of the reply itself."""
    usage = reply.get("usage")
    tokens = (usage if isinstance(usage, dict) else reply).get("prompt_tokens")
    return tokens if isinstance(tokens, int) else None


def _counted_by(sample: Sample) -> str:
    if sample.output_tokens is not None:
        return "usage"
    return "chunks" if sample.streamed else ""


def _status_hint(response: httpx2.Response) -> str:
    hints = {
        401: "give the key with --api-key-env NAME",
        403: "give the key with --api-key-env NAME",
        404: "is the path right? OpenAI-compatible servers answer below /v1; a `/chat` endpoint is named in full",
        503: "the server is not ready: wait until it has loaded its model",
    }
    return hints.get(response.status_code, "look at the server's own log")


def _ignore(_done: int) -> None:
    """Warm-up shows no progress."""
