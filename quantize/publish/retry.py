"""Tries a step again while what went wrong may pass: waits that double, with jitter, and an end to it.

In: a step that raises Again for what may pass. Out: its result, or TransferError with how often and how long it tried.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type

from quantize.errors import TransferError

Result = TypeVar("Result")
TOLD_SECONDS = 1.0


class Again(Exception):
    """Something that may pass. after: seconds that the other side asks to wait; moved: some of the work got done."""

    def __init__(self, reason: str, *, after: float | None = None, moved: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.after, self.moved = reason, after, moved


@dataclass(frozen=True)
class Retry:
    """How long to go on: with the defaults at least 22 seconds without any progress. pause: how to
    wait. tell: told of each wait that a user notices, from any thread."""

    tries: int = 8
    first_seconds: float = 0.5
    longest_seconds: float = 15.0
    longest_asked_seconds: float = 60.0
    pause: Callable[[float], object] = time.sleep
    tell: Callable[[str], object] = lambda _: None

    def wait(self, failures: int, asked: float | None) -> float:
        """Seconds to wait after so many failures in a row: half of the step fixed, half of it random."""
        step = min(self.first_seconds * 2.0 ** (failures - 1), self.longest_seconds)
        own = step / 2 + random.random() * step / 2
        return own if asked is None else min(max(own, asked), self.longest_asked_seconds)


class _Failures:
    """Counts failures in a row, for one call: progress starts the count again."""

    def __init__(self, retry: Retry, where: str) -> None:
        self._retry, self._where, self.count = retry, where, 0

    def are_enough(self, state: RetryCallState) -> bool:
        """Whether to give up."""
        self.count = 1 if _again(state).moved else self.count + 1
        return self.count >= self._retry.tries

    def wait(self, state: RetryCallState) -> float:
        """Seconds until the next try."""
        return self._retry.wait(max(self.count, 1), _again(state).after)

    def pause(self, seconds: float) -> None:
        """Wait."""
        self._retry.pause(seconds)

    def tell(self, state: RetryCallState) -> None:
        """Say that there is a wait, if it is one that a user notices."""
        seconds = state.upcoming_sleep
        if seconds >= TOLD_SECONDS:
            self._retry.tell(f"{self._where}: {_again(state).reason}; tried again in {seconds:.0f} s")


def persist(step: Callable[[], Result], retry: Retry, where: str) -> Result:
    """Call `step` until it returns; only failures in a row without progress count. Raises TransferError."""
    started, failures = time.monotonic(), _Failures(retry, where)
    retrying = Retrying(
        retry=retry_if_exception_type(Again), stop=failures.are_enough, wait=failures.wait,
        before_sleep=failures.tell, sleep=failures.pause, reraise=True,
    )  # fmt: skip
    try:
        return retrying(step)
    except Again as again:
        seconds = time.monotonic() - started
        raise TransferError(
            f"{where}: given up after {failures.count} tries in {seconds:.0f} s: {again.reason}",
            hint="run the same command again: what has arrived stays, and a tag is put only after all of it",
        ) from again


def _again(state: RetryCallState) -> Again:
    """What the last try failed of."""
    failure = state.outcome.exception() if state.outcome is not None else None
    assert isinstance(failure, Again)  # tenacity asks only after an exception of the type that is retried
    return failure
