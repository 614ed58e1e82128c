"""Structured logs: one JSON object a line, written by a thread so that a slow disk or pipe never holds up an answer.

In: events with facts: sizes, times, names. Out: lines on a stream. No prompt, answer or key is ever a fact.
"""

from __future__ import annotations

import logging
import queue
import threading
import traceback
from typing import Any, BinaryIO

import orjson
import structlog

QUEUE_LINES = 10_000

Log = structlog.typing.FilteringBoundLogger


class LogWriter:
    """Writes lines in a thread of its own. Lines past QUEUE_LINES are dropped and counted, not waited for."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lines: queue.Queue[bytes | None] = queue.Queue(QUEUE_LINES)
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def msg(self, line: bytes) -> None:
        """Take one line."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    debug = info = warning = error = critical = msg

    def close(self) -> None:
        """Write what is left."""
        self._lines.put(None)
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while True:
            lines = [self._lines.get()]
            while not self._lines.empty() and len(lines) < QUEUE_LINES:
                lines.append(self._lines.get_nowait())
            over = None in lines
            try:
                self._stream.write(b"".join(line + b"\n" for line in lines if line is not None))
                self._stream.flush()
            except (OSError, ValueError):
                self.dropped += len(lines)
            if over:
                return


def make_log(writer: LogWriter, level: str = "info") -> Log:
    """A logger that writes JSON lines."""
    number = logging.getLevelNamesMapping()[level.upper()]
    log: Log = structlog.wrap_logger(
        writer,
        wrapper_class=structlog.make_filtering_bound_logger(number),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(serializer=_dumps),
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


def _dumps(data: Any, **_: Any) -> bytes:
    return orjson.dumps(data, default=str)
