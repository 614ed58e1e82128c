"""How a run looks on stderr: a live line for each variant on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from quantize.events import Event, EventKind, Reporter

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

PLAIN_EVERY_SECONDS = 10.0


class QuietReporter:
    """Only what went wrong or should be acted on."""

    def emit(self, event: Event) -> None:
        """Print warnings and failures."""
        if event.kind in {EventKind.WARNING, EventKind.FAILED}:
            click.echo(_line(event), err=True)


class PlainReporter:
    """One line an event; progress at most every few seconds."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], float] = {}

    def emit(self, event: Event) -> None:
        """Print one event."""
        if event.kind is EventKind.PROGRESS:
            key, now = (event.subject, event.text), time.monotonic()
            first = self._last.setdefault(key, now)
            if now - first < PLAIN_EVERY_SECONDS:
                return
            self._last[key] = now
        click.echo(_line(event), err=True)


class LiveReporter:
    """A spinner or bar for the run and each variant, redrawn in place."""

    def __init__(self, console: Console) -> None:
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("[bold]{task.fields[subject]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> LiveReporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def emit(self, event: Event) -> None:
        """Redraw the line of the event's subject, or print above the lines."""
        if event.kind in {EventKind.NOTE, EventKind.WARNING, EventKind.FAILED}:
            self._progress.console.print(_line(event), markup=False, highlight=False)
        if event.kind in {EventKind.NOTE, EventKind.WARNING}:
            return
        task = self._task(event.subject)
        if event.kind is EventKind.PROGRESS and event.total:
            self._progress.update(task, description=event.text, completed=event.done, total=event.total)
        elif event.kind is EventKind.STATUS:
            self._progress.update(task, description=event.text, completed=0, total=None)
        elif event.kind in {EventKind.DONE, EventKind.FAILED}:
            text = event.text if event.kind is EventKind.DONE else "failed"
            self._progress.update(task, description=text, completed=1, total=1)

    def _task(self, subject: str) -> TaskID:
        if subject not in self._tasks:
            self._tasks[subject] = self._progress.add_task("", subject=subject, total=None)
        return self._tasks[subject]


@contextmanager
def console_reporter(*, quiet: bool) -> Iterator[Reporter]:
    """The reporter that suits stderr."""
    if quiet:
        yield QuietReporter()
    elif sys.stderr.isatty():
        from rich.console import Console

        with LiveReporter(Console(stderr=True)) as live:
            yield live
    else:
        yield PlainReporter()


def _line(event: Event) -> str:
    subject = f"{event.subject}: " if event.subject else ""
    kind = f"{event.kind}: " if event.kind in {EventKind.WARNING, EventKind.FAILED} else ""
    if event.kind is EventKind.PROGRESS and event.total:
        return f"{subject}{event.text} {100 * (event.done or 0) / event.total:.0f} %"
    return f"{subject}{kind}{event.text}"
