"""Golden answers of the source and of an artifact, side by side.

In: a GoldenSet, what was asked, the answers of both. Out: GoldenResult: per prompt who passed, why not, and the text of
both; and the rates that the gates look at. The runtimes are run by session.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantize.evaluate.golden import GoldenSet
from quantize.evaluate.graders import grade

SHOWN_CHARACTERS = 2000


@dataclass(frozen=True)
class GradedAnswer:
    """One model's answer; reason says why it did not pass."""

    text: str
    passed: bool
    reason: str


@dataclass(frozen=True)
class PromptResult:
    """One prompt, both answers."""

    key: str
    category: str
    language: str
    kind: str
    prompt: str
    source: GradedAnswer
    artifact: GradedAnswer

    @property
    def change(self) -> str:
        """ "kept", "lost" (only the source passed), "gained", or "failed" (neither did)."""
        if self.source.passed:
            return "kept" if self.artifact.passed else "lost"
        return "gained" if self.artifact.passed else "failed"


@dataclass(frozen=True)
class GoldenResult:
    """All prompts. Rates are None where the source passed nothing that they could be relative to.

    Prompts graded `same` have no right answer, and the source always passes them: they are shown, and counted apart.
    """

    results: tuple[PromptResult, ...]
    golden_hash: str
    context: int

    @property
    def judged(self) -> tuple[PromptResult, ...]:
        """The prompts that have a right answer."""
        return tuple(item for item in self.results if item.kind != "same")

    @property
    def source_passed(self) -> int:
        """Judged prompts that the source passes."""
        return sum(item.source.passed for item in self.judged)

    @property
    def artifact_passed(self) -> int:
        """Judged prompts that the artifact passes."""
        return sum(item.artifact.passed for item in self.judged)

    @property
    def lost(self) -> int:
        """Judged prompts that only the source passes."""
        return sum(item.change == "lost" for item in self.judged)

    @property
    def pass_rate_ratio(self) -> float | None:
        """Artifact's passes over the source's."""
        return self.artifact_passed / self.source_passed if self.source_passed else None

    @property
    def same_rate(self) -> float | None:
        """Share of the prompts graded `same` whose answer is near the source's."""
        same = [item.artifact.passed for item in self.results if item.kind == "same"]
        return sum(same) / len(same) if same else None

    @property
    def json_source_passed(self) -> int:
        """JSON prompts that the source passes."""
        return sum(item.source.passed for item in self.results if item.kind == "json")

    @property
    def json_lost(self) -> int:
        """JSON prompts that the source passes and the artifact does not."""
        return sum(item.change == "lost" for item in self.results if item.kind == "json")

    @property
    def json_loss(self) -> float | None:
        """Share of the source's good JSON answers that are lost."""
        return self.json_lost / self.json_source_passed if self.json_source_passed else None

    def keys(self, change: str) -> tuple[str, ...]:
        """Keys of the prompts with that change."""
        return tuple(item.key for item in self.results if item.change == change)


def compare_answers(
    golden: GoldenSet, prompts: Sequence[str], source: Sequence[str], artifact: Sequence[str], context: int
) -> GoldenResult:
    """Grade the answers of both models to the same prompts, in the order of the set."""
    results = []
    for item, asked, theirs, ours in zip(golden.prompts, prompts, source, artifact, strict=True):
        rule = item.prompt.grade
        judged_source = grade(rule, theirs, question=asked)
        judged_artifact = grade(rule, ours, theirs, question=asked)
        results.append(
            PromptResult(
                key=item.key,
                category=item.prompt.category,
                language=item.language,
                kind=rule.kind,
                prompt=_shortened(asked),
                source=GradedAnswer(theirs, judged_source.passed, judged_source.reason),
                artifact=GradedAnswer(ours, judged_artifact.passed, judged_artifact.reason),
            )
        )
    return GoldenResult(tuple(results), golden.hash, context)


def _shortened(text: str) -> str:
    """The two ends of a long prompt: a report is read by people."""
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters …]\n{text[-half:]}"
