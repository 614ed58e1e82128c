"""From pieces of text to what may be sent: nothing after a stop sequence, and no part of one before it is whole.

In: pieces as tokens give them. Out: text that is safe to send. Tokens and bytes are left to the models.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Cuts text at the first stop sequence; `stopped` says that one was found."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """Text that may be sent now."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        self._held += text
        found = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped = True
            ready, self._held = self._held[: min(found)], ""
            return ready
        keep = max(overlap(self._held, stop) for stop in self._stops)
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready

    def flush(self) -> str:
        """What was held back and turned out to be no stop sequence."""
        ready, self._held = self._held, ""
        return ready


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that a stop sequence begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
