"""A table of text, as both templates set it."""

from __future__ import annotations

from dataclasses import dataclass

MISSING = "not measured"


@dataclass(frozen=True)
class Table:
    """The first column names the row. marked: (row, column) of the cells that stand out."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: frozenset[tuple[int, int]] = frozenset()
