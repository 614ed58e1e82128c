"""What whoever runs a model asks of a decision: for what, on what, with which figures, and what to do when it fails.

In: a PageSubject and its Choice. Out: rows and tables for production_decision.md. Steps name what there is: commands of
this program, codes of its gateway, the artifacts of the recipe.
"""

from __future__ import annotations

from quantize.bench.result import Cell
from quantize.evaluate.metric import Detail
from quantize.evaluate.metrics import cells, headings, metrics
from quantize.report.collect import PageSubject
from quantize.report.production import Choice, ServingVerdict
from quantize.report.table import MISSING, Table
from quantize.system.sizes import mebibytes_text, size_text

OPEN = "to be filled in"
TITLES = {
    "use_case": "use case", "traffic": "traffic target", "sla": "SLA", "hardware": "hardware", "runtime": "runtime",
}  # fmt: skip


def serving_rows(subject: PageSubject, choice: Choice) -> tuple[tuple[str, str], ...]:
    """What the recipe says of serving; what it does not say is to be filled in, beside what was measured on."""
    given = subject.serving.model_dump()
    return tuple(
        (title, given[key] or f"{OPEN} (`serving.{key}` in the recipe){_measured(key, choice)}")
        for key, title in TITLES.items()
    )


def _measured(key: str, choice: Choice) -> str:
    bench = choice.serve.entry.bench if choice.serve else None
    if bench is None or key not in ("hardware", "runtime"):
        return ""
    used = bench.measured_with
    if key == "hardware":
        return f"; measured on {used.machine}"
    return "; measured in " + ", ".join([used.server, *(f"{name} {version}" for name, version in used.runtime.items())])


def quality_table(choice: Choice) -> Table:
    """Each artifact's figures against the source."""
    columns = metrics(Detail.TABLE, [verdict.evidence for verdict in choice.verdicts])
    rows = (
        (verdict.entry.variant, verdict.word, size_text(verdict.size_bytes), *cells(verdict.evidence, columns, MISSING))
        for verdict in choice.verdicts
    )
    return Table(("artifact", "verdict", "size", *headings(columns)), tuple(rows))


def load_table(choice: Choice) -> Table:
    """Each load that was measured of each artifact."""
    rows = [
        (verdict.entry.variant, *_load(cell, verdict))
        for verdict in choice.verdicts
        if verdict.entry.bench is not None
        for cell in verdict.entry.bench.cells
    ]
    return Table(("artifact", "load", "p50", "p95", "p99", "requests/s", "error rate", "memory peak"), tuple(rows))


def _load(cell: Cell, verdict: ServingVerdict) -> tuple[str, ...]:
    bench, spread = verdict.entry.bench, cell.latency
    peak = bench.peak_bytes if bench else None
    times = [MISSING] * 3 if spread is None else [f"{value:.3f} s" for value in (spread.p50, spread.p95, spread.p99)]
    return (
        f"{cell.shape} {cell.load}", *times, f"{cell.requests_per_second:.2f}", f"{cell.error_rate:.1%}",
        MISSING if peak is None else mebibytes_text(peak),
    )  # fmt: skip


def runbook(choice: Choice) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """What to do on a timeout, out of memory, and when answers get worse; () where nothing is served."""
    if choice.serve is None:
        return ()
    return (
        ("On timeout", _on_timeout(choice.serve)),
        ("On running out of memory", _out_of_memory(choice, choice.serve)),
        ("On a quality regression", _worse(choice, choice.serve)),
    )


def _on_timeout(serve: ServingVerdict) -> tuple[str, ...]:
    limit = serve.limits.max_latency_p95_seconds
    passes = "" if limit is None else f" If the 95th percentile stays over {limit:g} s, go back (Rollback)."
    return (
        "The gateway answers 504 `timeout`, and 429 where the queue is full; its log has the trace id of each.",
        "See whether requests wait or answers are slow: `quantize_queue_length` and `quantize_request_seconds` in "
        "/metrics.",
        "Where they wait: fewer answers at once are each faster (`--concurrency`), shorter ones make room "
        "(`--max-output-tokens`), `--rate` holds one client back; else another server beside it.",
        f"Where answers are slow without a queue: `quantize bench {serve.entry.called}` on that machine, beside the "
        f"figures above.{passes}",
        "Clients try again after `Retry-After`, with waits that double, and give up after a few times.",
    )


def _out_of_memory(choice: Choice, serve: ServingVerdict) -> tuple[str, ...]:
    smaller = [item for item in choice.usable if item.size_bytes < serve.size_bytes]
    other = (
        f"Take `{smaller[-1].entry.artifact.ref}` ({size_text(smaller[-1].size_bytes)}), which keeps every limit too."
        if smaller
        else "No smaller artifact keeps every limit: take more memory, not a worse model."
    )
    return (
        "The gateway answers 503 `out_of_memory` and goes on; a model's process that the system kills is `engine_died` "
        "in the log, and is started again.",
        "Let `--fallback NAME` answer meanwhile.",
        f"See what it may take: `quantize estimate {serve.entry.called} --context N --concurrency N`, and lower "
        "`--context` or `--concurrency` to what fits. `--force` is no remedy.",
        other,
    )


def _worse(choice: Choice, serve: ServingVerdict) -> tuple[str, ...]:
    back = f"`{choice.fallback.entry.artifact.ref}`" if choice.fallback else "the source"
    return (
        f"Go back to {back} first (Rollback), then look for the cause.",
        f"`quantize verify {serve.entry.called}` says whether the files are still those that were measured.",
        f"`quantize eval {serve.entry.called}` measures again: figures as above mean that the prompts have changed, "
        "other figures that the runtime has.",
        "Put the prompts that went wrong into the golden prompts (`evaluation.golden`), with what is right, and build "
        "again: the gates then hold them.",
        "With `--canary NAME=5%` the next one gets a share of the requests before all of them.",
    )
