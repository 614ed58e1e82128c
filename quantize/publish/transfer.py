"""Several blobs at once, with one progress for all of them, that end together when one fails.

In: one function a blob. Out: nothing, or the first error; the others have ended by then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace

from quantize.events import Reporter, note, progress
from quantize.publish.retry import Retry

DRAW_SECONDS = 0.1


class TransferStopped(Exception):
    """Another blob failed, or the user ended it."""


@dataclass
class Session:
    """How to transfer: so many blobs at a time, how long to try again, and whom to tell."""

    reporter: Reporter
    jobs: int = 4
    retry: Retry = field(default_factory=Retry)
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.retry = replace(self.retry, pause=self.stop.wait, tell=self._tell)

    def _tell(self, text: str) -> None:
        with self.lock:
            note(self.reporter, "", text)


class Progress:
    """Adds up what all threads have moved, in bytes, and tells the session's reporter of it, one at a time."""

    def __init__(self, session: Session, subject: str, text: str, total: int) -> None:
        self._session, self._subject, self._text, self._total = session, subject, text, total
        self._drawn = 0.0
        self.done = 0

    def count(self, more: int) -> None:
        """So many more bytes. Raises TransferStopped."""
        if self._session.stop.is_set():
            raise TransferStopped
        with self._session.lock:
            self.done += more
            now = time.monotonic()
            if now - self._drawn >= DRAW_SECONDS or self.done >= self._total:
                self._drawn = now
                progress(self._session.reporter, self._subject, self._text, self.done, self._total)


def run_all(tasks: Sequence[Callable[[], None]], session: Session) -> None:
    """Run all tasks, `session.jobs` at a time. Raises what the first that fails raises."""
    try:
        with ThreadPoolExecutor(max(1, session.jobs)) as pool:
            futures = [pool.submit(task) for task in tasks]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                session.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        session.stop.clear()
