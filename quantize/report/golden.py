"""Golden prompts on a page: who passes what, and the answers that changed, side by side, with the words that differ.

In: entries with golden results (see evaluate/record.py). Out: GoldenView. Answers are a model's: all of
them is text, whatever it looks like; the templates escape it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from quantize.evaluate.record import Change, GoldenRecord, PromptResult
from quantize.report.collect import MeasuredArtifact


class PromptState(StrEnum):
    """What a cell of the matrix says: what became of a prompt, or what there is to say where nothing is right."""

    KEPT = Change.KEPT
    LOST = Change.LOST
    GAINED = Change.GAINED
    FAILED = Change.FAILED
    DIFFERS = "differs"
    COMPARED = "compared"
    NONE = "none"

    @property
    def is_changed(self) -> bool:
        """Whether the artifact does otherwise than the source."""
        return self in (PromptState.LOST, PromptState.GAINED, PromptState.DIFFERS)


MARKS = {
    PromptState.KEPT: "pass", PromptState.GAINED: "gained", PromptState.LOST: "LOST", PromptState.FAILED: "fail",
    PromptState.NONE: "",
}  # fmt: skip
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
    change: PromptState
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
    cells: tuple[tuple[PromptState, str], ...]

    @property
    def changed(self) -> bool:
        """Whether an artifact does otherwise than the source."""
        return any(state.is_changed for state, _ in self.cells)


@dataclass(frozen=True)
class GoldenView:
    """All prompts. note: what was asked, or that nothing was."""

    variants: tuple[str, ...]
    matrix: tuple[MatrixRow, ...]
    diffs: tuple[Diff, ...]
    note: str


def golden_view(entries: Sequence[MeasuredArtifact]) -> GoldenView:
    """The matrix over all variants, and the differences of each."""
    asked = [(entry.variant, entry.golden) for entry in entries if entry.golden is not None and entry.golden.results]
    if not asked:
        return GoldenView((), (), (), "No golden prompts were asked: see `quantize eval`.")
    rows: dict[str, dict[str, PromptResult]] = {}
    for variant, golden in asked:
        for item in golden.results:
            rows.setdefault(item.key, {})[variant] = item
    variants = tuple(variant for variant, _ in asked)
    matrix = tuple(_row(key, found, variants) for key, found in rows.items())
    found = [diff for variant, golden in asked for diff in _diffs(variant, golden)]
    diffs = [replace(diff, start_open=number < OPEN_DIFFS) for number, diff in enumerate(found[:MAX_DIFFS])]
    _, golden = asked[0]
    note = f"{len(rows)} prompts, context {golden.context:,} tokens, sha256 {golden.hash[:12]}…"
    left_out = len(found) - MAX_DIFFS
    note += f"; {left_out} more changed answers are in measurements.json" if left_out > 0 else ""
    return GoldenView(variants, matrix, tuple(diffs), note)


def _row(key: str, found: Mapping[str, PromptResult], variants: Sequence[str]) -> MatrixRow:
    first = next(iter(found.values()))
    cells = [_of_source(first), *(_of_artifact(found.get(variant)) for variant in variants)]
    return MatrixRow(key, first.category, first.language, tuple(cells))


def _of_source(item: PromptResult) -> tuple[PromptState, str]:
    if item.is_compared:
        return PromptState.COMPARED, "as is"
    state = PromptState.KEPT if item.source.passed else PromptState.FAILED
    return state, MARKS[state]


def _of_artifact(item: PromptResult | None) -> tuple[PromptState, str]:
    if item is not None and item.is_compared:
        return (PromptState.KEPT, "alike") if item.artifact.passed else (PromptState.DIFFERS, "differs")
    state = PromptState.NONE if item is None else PromptState(item.change)
    return state, MARKS[state]


def _diffs(variant: str, golden: GoldenRecord) -> list[Diff]:
    changed = [item for item in golden.results if item.is_changed]
    changed.sort(key=lambda item: (item.is_compared, item.change is not Change.LOST))
    return [_diff(variant, item) for item in changed]


def _diff(variant: str, item: PromptResult) -> Diff:
    ours, theirs = pieces(item.artifact.text, item.source.text), pieces(item.source.text, item.artifact.text)
    change = PromptState.DIFFERS if item.is_compared else PromptState(item.change)
    return Diff(variant, item.key, change, item.prompt, theirs, ours, item.source.reason, item.artifact.reason)


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
