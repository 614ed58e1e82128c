"""Events that long work sends while it runs. Whoever listens decides how they look.

In: calls from plan, build, builders and measuring. Out: nothing here; the CLI draws, tests collect, workers forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class EventKind(StrEnum):
    """What an event tells."""

    STATUS = "status"  # its subject enters a step
    PROGRESS = "progress"  # done and total of a step
    NOTE = "note"  # worth knowing
    WARNING = "warning"  # worth acting on
    DONE = "done"  # a variant is finished
    FAILED = "failed"  # a variant is given up


@dataclass(frozen=True)
class Event:
    """One thing that happened. subject: the variant or source it is about; "" for the whole run."""

    kind: EventKind
    subject: str
    text: str
    done: float | None = None
    total: float | None = None


class Reporter(Protocol):
    """Receives events, in order, from one thread at a time."""

    def emit(self, event: Event) -> None:
        """Take one event; must be quick and must not raise."""


class SilentReporter:
    """Drops everything."""

    def emit(self, event: Event) -> None:
        """Drop the event."""


class ListReporter:
    """Keeps everything; for tests and for workers."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        """Keep the event."""
        self.events.append(event)


def status(reporter: Reporter, subject: str, text: str) -> None:
    """Say that `subject` enters a step."""
    reporter.emit(Event(EventKind.STATUS, subject, text))


def progress(reporter: Reporter, subject: str, text: str, done: float, total: float) -> None:
    """Say how far a step is; `done` and `total` share a unit that the text names."""
    reporter.emit(Event(EventKind.PROGRESS, subject, text, done, total))


def note(reporter: Reporter, subject: str, text: str) -> None:
    """Say something worth knowing."""
    reporter.emit(Event(EventKind.NOTE, subject, text))


def warn(reporter: Reporter, subject: str, text: str) -> None:
    """Say something worth acting on."""
    reporter.emit(Event(EventKind.WARNING, subject, text))
