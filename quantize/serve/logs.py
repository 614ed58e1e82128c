"""Structured logs: one JSON object or text a line, by a thread, so that a slow disk or pipe never holds up an answer.

In: events with facts: sizes, times, names. Out: lines on a stream. No prompt, answer or key is ever a fact.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import re
import traceback
from collections.abc import MutableMapping
from logging.handlers import QueueListener
from typing import Any, BinaryIO

import orjson
import structlog

JSON, TEXT = "json", "text"
FORMS = (JSON, TEXT)
TEXT_TIME = "%Y-%m-%d %H:%M:%S"
PLAIN = re.compile(r"[!-~]+")
QUEUE_LINES = 10_000
CLOSE_SECONDS = 5.0

Log = structlog.typing.FilteringBoundLogger


class LogWriter(QueueListener):
    """Writes lines in the listener's thread. Lines past QUEUE_LINES are dropped and counted, not waited for."""

    def __init__(self, stream: BinaryIO) -> None:
        self._lines: queue.Queue[bytes | None] = queue.Queue(QUEUE_LINES)
        super().__init__(self._lines)
        self._stream = stream
        self.dropped = 0
        self.start()

    def msg(self, line: bytes) -> None:
        """Take one line."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    debug = info = warning = error = critical = msg

    def handle(self, record: Any) -> None:
        """Write one line; structlog has rendered it already."""
        try:
            self._stream.write(record + b"\n")
            self._stream.flush()
        except (OSError, ValueError):
            self.dropped += 1

    def close(self) -> None:
        """Write what is left, for up to CLOSE_SECONDS: a stream that hangs holds up no shutdown."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=CLOSE_SECONDS)
        if self._thread is not None:
            self._thread.join(timeout=CLOSE_SECONDS)


def make_log(writer: LogWriter, level: str = "info", form: str = JSON) -> Log:
    """A logger that writes JSON lines, in UTC, or text for people, in local time."""
    clock = structlog.processors.TimeStamper(fmt="iso", utc=True)
    if form == TEXT:
        clock = structlog.processors.TimeStamper(fmt=TEXT_TIME, utc=False)
    number = logging.getLevelNamesMapping()[level.upper()]
    log: Log = structlog.wrap_logger(
        writer,
        wrapper_class=structlog.make_filtering_bound_logger(number),
        processors=[
            structlog.processors.add_log_level,
            clock,
            structlog.processors.JSONRenderer(serializer=_dumps) if form == JSON else _as_text,
        ],
    )
    return log


def where(exc: BaseException) -> str:
    """Type of an exception and the lines of code that it passed; never its message, which may quote a prompt."""
    steps = traceback.extract_tb(exc.__traceback__)[-4:]
    return f"{type(exc).__name__} at " + " < ".join(f"{step.name}:{step.lineno}" for step in reversed(steps))


class ServerLogs(logging.Handler):
    """What uvicorn and libraries log, as our own lines; exceptions without their messages."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        exc = record.exc_info[1] if record.exc_info else None
        facts = {"error": where(exc)} if exc else {"message": str(record.msg)[:200]}
        self._log.warning("server", logger=record.name, **facts)


def _as_text(_logger: Any, _name: str, line: MutableMapping[str, Any]) -> bytes:
    """`2026-01-31 12:00:00 | [After model load] GPU: …`, or `… | event name=value`; what is no news has no level.

    A line on memory stands alone: whoever reads it knows its form.
    """
    time, level, event = line.pop("timestamp"), line.pop("level"), str(line.pop("event"))
    if event.startswith("["):
        return f"{time} | {event}".encode()
    words = [event if level == "info" else f"{level.upper()} {event}"]
    words += [f"{name}={_word(value)}" for name, value in line.items()]
    return f"{time} | {' '.join(words)}".encode()


def _word(value: Any) -> str:
    """A value without white space outside of quotes, on one line whatever is in it."""
    if isinstance(value, str) and PLAIN.fullmatch(value):
        return value
    return _dumps(value).decode()


def _dumps(data: Any, **_: Any) -> bytes:
    return orjson.dumps(data, default=str)
