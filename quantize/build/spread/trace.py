"""A timeline of what ran where and when, for chrome://tracing and ui.perfetto.dev.

In: spans. Out: JSON in Chrome's trace event format: a process for each node, a thread for each worker.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantize.errors import UsageError, first_line
from quantize.events import Reporter, warn


@dataclass(frozen=True)
class Span:
    """One piece of work. kind: "forward", "complete", "solve", "write" or "build". Seconds since the epoch."""

    node: str
    worker: str
    kind: str
    name: str
    start: float
    end: float
    block: int = -1

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


def check_trace(path: Path) -> None:
    """Raise UsageError where a trace could not be written; before the work, not after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        path.open("ab").close()
        if not there:
            path.unlink()
    except OSError as exc:
        raise UsageError(
            f"--trace {path}: {first_line(exc)}", hint="name a file in a folder that can be written"
        ) from exc


def write_trace(path: Path, spans: Iterable[Span], reporter: Reporter) -> None:
    """Write the spans, and names for the lines that a viewer draws; a failure is a warning: a build is worth more."""
    ordered = sorted(spans, key=lambda span: span.start)
    nodes = {name: number for number, name in enumerate(dict.fromkeys(span.node for span in ordered))}
    workers = {name: number for number, name in enumerate(dict.fromkeys((s.node, s.worker) for s in ordered))}
    zero = ordered[0].start if ordered else 0.0
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": number, "args": {"name": name}} for name, number in nodes.items()
    ]
    for (node, worker), number in workers.items():
        where = {"pid": nodes[node], "tid": number}
        events.append({"ph": "M", "name": "thread_name", **where, "args": {"name": worker}})
    for span in ordered:
        where = {"pid": nodes[span.node], "tid": workers[span.node, span.worker]}
        times = {"ts": round(1e6 * (span.start - zero)), "dur": round(1e6 * span.seconds)}
        events.append({"ph": "X", "name": span.name, "cat": span.kind, **where, **times, "args": asdict(span)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"traceEvents": events}, indent=0) + "\n", encoding="utf-8")
    except OSError as exc:
        warn(reporter, "cluster", f"no trace at {path}: {exc.strerror}")


def read_trace(path: Path) -> list[Span]:
    """The spans of a trace that `write_trace` wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return [Span(**event["args"]) for event in data["traceEvents"] if event["ph"] == "X"]
