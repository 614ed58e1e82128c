"""A bench run as a page for people: results.md.

In: a BenchResult. Out: Markdown; the same run gives the same text. Its first line says what the file is.
"""

from __future__ import annotations

from pathlib import Path

from quantize.bench.result import BenchResult, Cell, MemoryUse, Percentiles
from quantize.errors import UsageError, disk_errors
from quantize.system.files import write_text
from quantize.system.sizes import mebibytes_text

TITLE = "# Load, measured by quantize bench"
COLUMNS = ("config", "p50", "p95", "p99", "requests/s", "error rate", "RAM peak", "VRAM peak", "note")
NOTES = (
    "config: shape (tokens in : tokens out, at most) x requests at a time, or requests a second. p50, p95 and p99 are",
    "of the time to the end of an answer; memory is the most of the whole run.",
)
NOT_SEEN = "not seen"


def check_page(path: Path) -> None:
    """Refuse to write over a file that is no such page, before anything is measured. Raises UsageError."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            ours = file.readline().rstrip("\n") == TITLE
    except FileNotFoundError:
        return
    except OSError as exc:
        raise UsageError(f"{path}: {exc.strerror}", hint="name another file with --results") from exc
    if not ours:
        raise UsageError(f"{path} is there, and is not a page of results", hint="name another file with --results")


def write_page(path: Path, result: BenchResult) -> None:
    """Write the page. Raises DiskFullError."""
    with disk_errors(path.parent):
        write_text(path, page_text(result))


def page_text(result: BenchResult) -> str:
    """The page of a run."""
    used = result.measured_with
    runtime = " ".join(f"{name} {version}" for name, version in used.runtime.items())
    loop = "closed loop" if result.loop == "closed" else "open loop, Poisson arrivals"
    machine = [used.processor, f"{used.cores} cores", f"{used.ram_bytes / 2**30:.0f} GiB", *used.gpus]
    facts = [
        ("model", used.model or "unknown"),
        ("server", f"{used.server} {runtime}".strip()),
        ("context", f"{used.context:,} tokens" if used.context else None),
        ("threads", str(used.threads) if used.threads else None),
        ("machine", ", ".join(machine)),
        ("load", f"{loop}, {result.requests_per_cell} requests a row, {result.warm_up_requests} warm-up requests"),
        ("measured", result.measured_at),
    ]
    memory = (_peak(result.ram), _peak(result.vram))
    rows = [COLUMNS, ("---", *("---:" for _ in COLUMNS[1:-1]), "---")]
    rows += [_row(cell, memory, result) for cell in result.cells]
    lines = [TITLE, "", "| | |", "|---|---|", *(f"| {name} | {cell_text(text)} |" for name, text in facts if text), ""]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *NOTES]) + "\n"


def _row(cell: Cell, memory: tuple[str, str], result: BenchResult) -> tuple[str, ...]:
    times = (_seconds(cell.latency, name) for name in ("p50", "p95", "p99"))
    config = f"{cell.shape} ({cell.prompt_tokens}:{cell.output_tokens}) {cell.load}"
    rate = f"{cell.requests_per_second:.2f}"
    return (cell_text(config), *times, rate, f"{cell.error_rate:.1%}", *memory, cell_text(_note(cell, result)))


def _note(cell: Cell, result: BenchResult) -> str:
    """What is to be known of a row."""
    notes = [f"{count} x {kind}" for kind, count in cell.errors.items()]
    if cell.requests < result.requests_per_cell:
        seconds = f"{result.max_seconds_per_cell:g} s were over"
        notes.append(f"{cell.requests} of {result.requests_per_cell} requests: {seconds}")
    if cell.without_text:
        notes.append(f"{cell.without_text} answers without text")
    if result.vram is not None and result.vram.scope == "device":
        notes.append("VRAM is of the whole GPU")
    return "; ".join(notes)


def _peak(use: MemoryUse | None) -> str:
    return NOT_SEEN if use is None else mebibytes_text(use.peak_bytes)


def _seconds(spread: Percentiles | None, name: str) -> str:
    return "-" if spread is None else f"{float(getattr(spread, name)):.3f} s"


def cell_text(text: str) -> str:
    """Text that can't leave its cell of a Markdown table, nor be taken for HTML."""
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\r", " "), ("\n", " ")):
        text = text.replace(mark, safe)
    return text
