"""What an acceptance script has measured, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One figure. computed: what it was expected to be. holds: None where nothing depends on it."""

    name: str
    measured: str
    computed: str = ""
    holds: bool | None = None


def table(lines: Sequence[Line]) -> str:
    """Markdown."""
    words = {None: "", True: "holds", False: "DOES NOT HOLD"}
    rows = [f"| {line.name} | {line.measured} | {line.computed} | {words[line.holds]} |" for line in lines]
    return "\n".join(["| | measured | computed | |", "|---|---|---|---|", *rows])
