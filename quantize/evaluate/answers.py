"""Golden answers of the source and of an artifact, side by side.

In: a GoldenSet, what was asked, the answers of both. Out: a GoldenRecord: per prompt who passed, why not, and the text
of both; and the counts that the gates look at. The runtimes are run by session.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from quantize.evaluate.golden import GoldenPrompt, GoldenSet
from quantize.evaluate.graders import grade
from quantize.evaluate.record import Change, GoldenRecord, GradedAnswer, PromptResult

SHOWN_CHARACTERS = 2000


def compare_answers(
    golden: GoldenSet, prompts: Sequence[str], source: Sequence[str], artifact: Sequence[str], context: int
) -> GoldenRecord:
    """Grade the answers of both models to the same prompts, in the order of the set."""
    pairs = zip(golden.prompts, prompts, source, artifact, strict=True)
    return GoldenRecord.of((_result(*pair) for pair in pairs), golden.hash, context)


def _result(item: GoldenPrompt, asked: str, theirs: str, ours: str) -> PromptResult:
    rule = item.prompt.grade
    source, artifact = grade(rule, theirs, question=asked), grade(rule, ours, theirs, question=asked)
    return PromptResult(
        key=item.key,
        category=item.prompt.category,
        language=item.language,
        kind=rule.kind,
        prompt=_shortened(asked),
        change=change(source=source.passed, artifact=artifact.passed),
        source=GradedAnswer(text=theirs, passed=source.passed, reason=source.reason),
        artifact=GradedAnswer(text=ours, passed=artifact.passed, reason=artifact.reason),
    )


def change(*, source: bool, artifact: bool) -> Change:
    """What became of a prompt, by who passes it."""
    if source:
        return Change.KEPT if artifact else Change.LOST
    return Change.GAINED if artifact else Change.FAILED


def _shortened(text: str) -> str:
    """The two ends of a long prompt: a report is read by people."""
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters …]\n{text[-half:]}"
