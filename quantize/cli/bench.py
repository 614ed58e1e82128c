"""quantize bench URL|ARTIFACT"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from quantize.bench.client import parse_endpoint
from quantize.bench.page import check_page, write_page
from quantize.bench.prompts import SHAPES, parse_shape
from quantize.bench.result import BenchResult, Cell, MemoryUse, Percentiles
from quantize.bench.server import KINDS, Kind
from quantize.bench.session import LoadSettings, bench_artifact, bench_url, check_settings
from quantize.cli.common import (
    json_option,
    print_json,
    quiet_option,
    store_option,
    verbose_option,
)
from quantize.cli.progress import console_reporter
from quantize.cli.table import Column, print_table, wide_option
from quantize.errors import BenchError, UsageError
from quantize.store.artifact import Artifact, update_measurements
from quantize.store.store import Store
from quantize.system.machine import usable_cores
from quantize.system.sizes import mebibytes_text
from quantize.targets import AddressTarget, ArtifactTarget, find_target

RESULTS_NAME = "results.md"
COLUMNS = [
    Column("SHAPE"), Column("IN", "right", rank=7), Column("OUT", "right", rank=6), Column("LOAD", "right"),
    Column("REQUESTS", "right", rank=8), Column("TTFT P50", "right", rank=4), Column("TTFT P95", "right", rank=3),
    Column("P50", "right"), Column("P95", "right"), Column("P99", "right"), Column("TOKENS/S", "right", rank=2),
    Column("REQUESTS/S", "right", rank=1), Column("ERRORS", "right"), Column("KINDS"),
]  # fmt: skip


def _numbers(kind: type[int] | type[float]) -> Callable[[click.Context, click.Parameter, str], tuple[float, ...]]:
    """Reads "1,4,8": numbers above zero; "" is none."""

    def read(context: click.Context, parameter: click.Parameter, value: str) -> tuple[float, ...]:
        try:
            numbers = tuple(kind(part) for part in value.split(",")) if value else ()
        except ValueError:
            numbers = (0,)
        if not all(0 < number <= 1e6 for number in numbers):
            raise click.BadParameter(f"{value!r} is no list of numbers above 0, such as 1,4,8", context, parameter)
        return numbers

    return read


@click.command("bench")
@click.argument("target", metavar="URL|ARTIFACT")
@click.option(
    "--shape", "shapes", multiple=True, metavar="NAME|IN:OUT",
    help=", ".join(f"{item.name} ({item.prompt_tokens}:{item.output_tokens})" for item in SHAPES)
    + ", or tokens in and out; may be given several times.  [default: those three]",
)  # fmt: skip
@click.option(
    "--concurrency", callback=_numbers(int), default="1,4,8", show_default=True, metavar="N,N",
    help="Requests at a time; each waits for its answer.",
)  # fmt: skip
@click.option(
    "--rate", "rates", callback=_numbers(float), default="", metavar="R,R",
    help="Poisson arrivals a second, answered or not, in place of --concurrency: queueing is seen.",
)  # fmt: skip
@click.option("--requests", type=click.IntRange(min=1), default=24, show_default=True, help="Requests in each cell.")
@click.option(
    "--max-seconds", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True,
    help="Begin no request of a cell after this.",
)  # fmt: skip
@click.option(
    "--warm-up", type=click.IntRange(min=0), default=None,
    help="Requests before each cell that are not counted.  [default: as many as run at a time]",
)  # fmt: skip
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), default=120.0, show_default=True,
    help="Seconds to wait for each token before a request has failed.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of prompts and arrival times.")
@click.option(
    "--results", type=click.Path(path_type=Path, dir_okay=False), default=RESULTS_NAME, show_default=True,
    help="File to write the results to, as Markdown.",
)  # fmt: skip
@click.option("--no-results", is_flag=True, help="Write no such file.")
@click.option("--model", default="", help="Model to ask a URL for.  [default: the first that it lists]")
@click.option("--api-key-env", metavar="NAME", help="Environment variable that holds the key of a URL.")
@click.option(
    "--body", metavar="JSON", default="{}", help="More fields of each request, such as '{\"ignore_eos\": true}'."
)
@click.option("--server", type=click.Choice(KINDS), default="auto", show_default=True, help="What serves an artifact.")
@click.option("--context", type=click.IntRange(min=1), default=None, help="Of an artifact's server.  [default: enough]")
@click.option(
    "--threads", type=click.IntRange(min=1), default=None, help="Of an artifact's server.  [default: all cores]"
)
@store_option
@wide_option
@json_option
@quiet_option
@verbose_option
def command(
    target: str, shapes: tuple[str, ...], concurrency: tuple[int, ...], rates: tuple[float, ...], requests: int,
    max_seconds: float, warm_up: int | None, timeout: float, seed: int, results: Path, no_results: bool, model: str,
    api_key_env: str | None, body: str,
    server: Kind, context: int | None, threads: int | None, store: Store, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Load a server and time its answers.

    URL: any OpenAI-compatible server (http://127.0.0.1:8000), or a /chat endpoint (http://127.0.0.1:8000/chat).
    ARTIFACT: a server is started for it and stopped at the end, and the result is kept in its measurements.json.
    A table of it is written to results.md.
    """
    chosen = tuple(parse_shape(text) for text in shapes) or SHAPES
    settings = LoadSettings(chosen, concurrency, rates, requests, max_seconds, warm_up, timeout, seed)
    check_settings(settings)
    if not no_results:
        check_page(results)
    extra = _fields(body)
    found = find_target(target, store, (ArtifactTarget, AddressTarget))
    artifact = found.artifact if isinstance(found, ArtifactTarget) else None
    with console_reporter(quiet=quiet or as_json) as reporter:
        if artifact is None:
            endpoint = parse_endpoint(target, headers=_key(api_key_env), extra=extra, model=model)
            result = bench_url(endpoint, settings, reporter)
        else:
            cores = threads or usable_cores()
            result = bench_artifact(artifact, server, settings, reporter, context=context, threads=cores, extra=extra)
    if as_json:
        print_json(result.as_json())
    else:
        _print(result)
    if not no_results:
        write_page(results, result)
        if not (quiet or as_json):
            click.echo(f"results are in {results}", err=True)
    if not result.succeeded:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in result.errors.items())
        raise BenchError(f"no request succeeded: {kinds}", hint=_example(result))
    if artifact is not None:
        _keep(store, artifact, result, quiet=quiet or as_json)


def _keep(store: Store, artifact: Artifact, result: BenchResult, *, quiet: bool) -> None:
    update_measurements(store.root, artifact, {"bench": result.model_dump(mode="json")})
    if not quiet:
        click.echo(f"kept in {artifact.folder}/measurements.json; see `quantize report`", err=True)


def _fields(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as exc:
        raise UsageError(f"--body is no JSON: {exc}", hint="write it like '{\"ignore_eos\": true}'") from exc
    if not isinstance(data, dict):
        raise UsageError("--body is no JSON object", hint="write it like '{\"ignore_eos\": true}'")
    return data


def _key(name: str | None) -> dict[str, str]:
    if name is None:
        return {}
    if not os.environ.get(name):
        raise UsageError(f"--api-key-env: the environment has no {name}", hint=f"export {name} first")
    return {"Authorization": f"Bearer {os.environ[name]}"}


def _example(result: BenchResult) -> str:
    texts = [f"{kind}: {text}" for cell in result.cells for kind, text in cell.error_examples.items() if text]
    return texts[0] if texts else "look at the server's own log"


def _print(result: BenchResult) -> None:
    print_table(COLUMNS, [_row(cell) for cell in result.cells], empty="nothing was measured")
    memory = [_memory_row(name, use) for name, use in (("RAM", result.ram), ("VRAM", result.vram)) if use]
    columns = [
        Column("MEMORY"),
        Column("BEFORE LOAD", "right"),
        Column("AFTER WARM-UP", "right"),
        Column("PEAK", "right"),
    ]
    print_table(columns, memory, empty="memory: not measured (the server's process is not one of this machine's)\n")
    used = result.measured_with
    facts = [f"{used.model or 'model unknown'}", f"{used.server} {_versions(used.runtime)}".strip()]
    facts += [f"context {used.context}"] if used.context else []
    facts += [f"{used.threads} threads"] if used.threads else []
    facts += [f"{used.concurrency} answers at once"] if used.concurrency else []
    click.echo(", ".join([*facts, used.machine]))
    tokens = {"usage": "the server", "chunks": "pieces of the stream", None: "nobody"}[result.tokens_counted_by]
    without = sum(cell.without_text for cell in result.cells)
    if without:
        click.echo(f"{without} of {result.succeeded} answers were reasoning or tool calls alone, without text")
    loop = "closed loop" if result.loop == "closed" else "open loop, timed from the intended arrival"
    click.echo(f"{loop}; {result.warm_up_requests} warm-up requests left out; tokens counted by {tokens}")


def _row(cell: Cell) -> list[str]:
    tokens = cell.output_tokens_per_second
    prompt, output = cell.mean_prompt_tokens, cell.mean_output_tokens
    return [
        cell.shape,
        f"{cell.prompt_tokens:,}" if prompt is None else f"{prompt:,.0f}",
        f"{cell.output_tokens:,}" if output is None else f"{output:,.0f}",
        cell.load,
        f"{cell.requests}",
        _seconds(cell.first_token, "p50"),
        _seconds(cell.first_token, "p95"),
        *(_seconds(cell.latency, name) for name in ("p50", "p95", "p99")),
        "-" if tokens is None else f"{tokens:,.1f}",
        f"{cell.requests_per_second:,.2f}",
        f"{cell.error_rate:.1%}",
        ", ".join(f"{count} {kind}" for kind, count in cell.errors.items()),
    ]


def _memory_row(name: str, use: MemoryUse) -> list[str]:
    title = name if use.scope == "process" else f"{name} (whole GPU)"
    return [
        title,
        *(mebibytes_text(size) for size in (use.before_load_bytes, use.after_warm_up_bytes, use.peak_bytes)),
    ]


def _seconds(spread: Percentiles | None, name: str) -> str:
    if spread is None:
        return "-"
    value = float(getattr(spread, name))
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def _versions(runtime: dict[str, str]) -> str:
    return " ".join(f"{name} {version}" for name, version in runtime.items() if name != "quantize")
