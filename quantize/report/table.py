"""A table of text, as both templates set it."""

from __future__ import annotations

from dataclasses import dataclass

MISSING = "not measured"


@dataclass(frozen=True)
class Table:
    """The first column names the row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
