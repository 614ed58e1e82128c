"""Golden prompts on a page: who passes what, and the answers that changed, side by side, with the words that differ.

In: entries with golden results (see evaluate/record.py). Out: GoldenView. Answers are a model's: all of
them is text, whatever it looks like; the templates escape it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantize.report.collect import MeasuredArtifact

MARKS = {"kept": "pass", "gained": "gained", "lost": "LOST", "failed": "fail"}
MAX_DIFFED = 4000
"""Characters of an answer that are compared word by word; of longer ones all is shown, unmarked."""
OPEN_DIFFS = 3
MAX_DIFFS = 60
WORDS = re.compile(r"\s+|\w+|[^\w\s]")


@dataclass(frozen=True)
class Piece:
    """A run of an answer; changed: it is not in the other one."""

    text: str
    changed: bool


@dataclass(frozen=True)
class Diff:
    """One prompt whose outcome changed. start_open: unfolded from the start."""

    variant: str
    key: str
    change: str
    prompt: str
    source: tuple[Piece, ...]
    artifact: tuple[Piece, ...]
    source_reason: str
    artifact_reason: str
    start_open: bool = False


@dataclass(frozen=True)
class MatrixRow:
    """One prompt: (what became of it, word) for the source and then for each variant."""

    key: str
    category: str
    language: str
    cells: tuple[tuple[str, str], ...]

    @property
    def changed(self) -> bool:
        """Whether an artifact does otherwise than the source."""
        return any(state in ("lost", "gained", "differs") for state, _ in self.cells)


@dataclass(frozen=True)
class GoldenView:
    """All prompts. note: what was asked, or that nothing was."""

    variants: tuple[str, ...]
    matrix: tuple[MatrixRow, ...]
    diffs: tuple[Diff, ...]
    note: str


def golden_view(entries: Sequence[MeasuredArtifact]) -> GoldenView:
    """The matrix over all variants, and the differences of each."""
    asked = [entry for entry in entries if entry.golden.get("results")]
    if not asked:
        return GoldenView((), (), (), "No golden prompts were asked: see `quantize eval`.")
    rows: dict[str, dict[str, Mapping[str, Any]]] = {}
    for entry in asked:
        for item in entry.golden["results"]:
            rows.setdefault(str(item["key"]), {})[entry.variant] = item
    variants = tuple(entry.variant for entry in asked)
    matrix = tuple(_row(key, found, variants) for key, found in rows.items())
    found = [diff for entry in asked for diff in _diffs(entry)]
    diffs = [replace(diff, start_open=number < OPEN_DIFFS) for number, diff in enumerate(found[:MAX_DIFFS])]
    golden = asked[0].golden
    note = (
        f"{len(rows)} prompts, context {golden.get('context', 0):,} tokens, sha256 {str(golden.get('hash', ''))[:12]}…"
    )
    left_out = len(found) - MAX_DIFFS
    note += f"; {left_out} more changed answers are in measurements.json" if left_out > 0 else ""
    return GoldenView(variants, matrix, tuple(diffs), note)


def _row(key: str, found: Mapping[str, Mapping[str, Any]], variants: Sequence[str]) -> MatrixRow:
    first = next(iter(found.values()))
    compared = first.get("kind") == "same"
    source = "kept" if first["source"]["passed"] else "failed"
    cells = [("compared", "as is") if compared else (source, "pass" if source == "kept" else "fail")]
    for variant in variants:
        item = found.get(variant)
        change = str(item["change"]) if item else "none"
        word = MARKS.get(change, "")
        if compared and item:
            change, word = ("kept", "alike") if item["artifact"]["passed"] else ("differs", "differs")
        cells.append((change, word))
    return MatrixRow(key, str(first.get("category", "")), str(first.get("language", "")), tuple(cells))


def _diffs(entry: MeasuredArtifact) -> list[Diff]:
    changed = [item for item in entry.golden["results"] if item["change"] in ("lost", "gained")]
    changed.sort(key=lambda item: (item.get("kind") == "same", item["change"] != "lost"))
    return [_diff(entry.variant, item) for item in changed]


def _diff(variant: str, item: Mapping[str, Any]) -> Diff:
    source, artifact = str(item["source"]["text"]), str(item["artifact"]["text"])
    ours, theirs = pieces(artifact, source), pieces(source, artifact)
    change = "differs" if item.get("kind") == "same" else str(item["change"])
    return Diff(
        variant, str(item["key"]), change, str(item["prompt"]), theirs, ours,
        str(item["source"]["reason"]), str(item["artifact"]["reason"]),
    )  # fmt: skip


def pieces(text: str, other: str) -> tuple[Piece, ...]:
    """`text` in runs, those that are not in `other` marked as changed; together they are `text`."""
    if max(len(text), len(other)) > MAX_DIFFED:
        return (Piece(text, False),)
    words, others = WORDS.findall(text), WORDS.findall(other)
    matcher = difflib.SequenceMatcher(None, words, others, autojunk=False)
    found = [
        Piece("".join(words[start:end]), tag != "equal")
        for tag, start, end, _, _ in matcher.get_opcodes()
        if end > start
    ]
    return tuple(found)
