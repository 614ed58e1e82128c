"""What source and artifact are both given: held-out text, questions, golden prompts, as token ids.

In: an EvaluationJob. Out: Material. The source's own answers, which are text too, are not in it: they are the source's
to write (source_side.py), and `windows` takes them in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.errors import UsageError
from quantize.evaluate.chat import answered_windows, read_questions, requests_of
from quantize.evaluate.golden import GoldenSet, load_golden
from quantize.evaluate.held_out import hold_against
from quantize.evaluate.job import EvaluationJob
from quantize.evaluate.kinds import NamedText
from quantize.evaluate.prompts import Asked, PromptTokenizer, ask
from quantize.evaluate.tasks import load
from quantize.evaluate.text import Windows, cut_windows, joined, load_text
from quantize.model.checkpoint import read_json
from quantize.model.shape import ModelShape
from quantize.runtimes.base import Prompted

if TYPE_CHECKING:
    from quantize.evaluate.harness import LoadedTask

DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class QuestionSet:
    """Questions of one kind of text, and what is asked for them."""

    kind: str
    questions: tuple[str, ...]
    requests: tuple[Prompted, ...]


@dataclass(frozen=True)
class Material:
    """What both models are given. given: windows of each text that is there. question_sets: text that the source is to
    write. golden, asked: None where no prompts are asked. context: tokens of a prompt and its answer. longest: tokens
    that a model reads at a time. held_out: how it is known that the text was not calibrated on. tasks: of
    lm-evaluation-harness, with their data; task_context: tokens of a request of theirs.
    """

    tokenizer: PromptTokenizer
    text_name: str
    given: tuple[Windows, ...]
    question_sets: tuple[QuestionSet, ...]
    golden: GoldenSet | None
    asked: Asked | None
    context: int
    longest: int
    held_out: str
    tasks: tuple[LoadedTask, ...] = ()
    task_context: int = 0

    @property
    def requests(self) -> tuple[Prompted, ...]:
        """All that the source answers: questions first, then golden prompts."""
        asked = self.asked.requests if self.asked is not None else ()
        return tuple(item for part in self.question_sets for item in part.requests) + asked

    @property
    def questions(self) -> int:
        """How many of the requests are questions."""
        return sum(len(part.requests) for part in self.question_sets)

    def windows(self, answers: Sequence[Sequence[int]] | None) -> Windows:
        """All windows. answers: of the source, to `requests`; None where it answers nothing.

        Raises UsageError: there is no text at all.
        """
        parts = [*self.given]
        left = iter(answers or ())
        for part in self.question_sets if answers is not None else ():
            answered = [next(left) for _ in part.requests]
            found = answered_windows(part.requests, answered, part.questions, part.kind)
            parts += [found] if found is not None else []
        if not parts:
            raise UsageError("no text to measure on: the source answers none of the questions", hint="name other text")
        return joined(parts, self.text_name)


def read_material(job: EvaluationJob) -> Material:
    """Read and tokenize. Raises UsageError, RecipeError; RefusedError: the text was calibrated on."""
    folder = tokenizer_folder(job)
    tokenizer = PromptTokenizer(folder)
    window = job.extent.window
    given = tuple(_cut(part, job, tokenizer) for part in job.text if not part.is_questions)
    held_out = hold_against(given, job.calibrated_on, folder)
    limit = _max_context(job.source.folder)
    context = job.context or min(DEFAULT_CONTEXT, limit)
    sets = tuple(_questions(part, job, tokenizer, min(window, limit)) for part in job.text if part.is_questions)
    named = (tokenizer, job.text_name, given, sets)
    tasks = load(job.tasks)
    asks = (tasks, context) if tasks else ((), 0)
    if not job.golden:
        return Material(*named, None, None, 0, max(window, asks[1]), held_out, *asks)
    golden = load_golden(job.golden)
    asked = ask(golden, tokenizer, context)
    return Material(*named, golden, asked, context, max(window, context), held_out, *asks)


def tokenizer_folder(job: EvaluationJob) -> Path:
    """Where the source's tokenizer is; the artifact's, where the source has none."""
    return job.source.folder if (job.source.folder / "tokenizer_config.json").is_file() else job.artifact.folder


def _cut(part: NamedText, job: EvaluationJob, tokenizer: PromptTokenizer) -> Windows:
    text = load_text(part.address, Path(), column=job.column)
    window, limit = job.extent.window, job.extent.windows or part.windows
    return cut_windows(text, tokenizer.encode, prefix=tokenizer.prefix, window=window, limit=limit, kind=part.kind)


def _questions(part: NamedText, job: EvaluationJob, tokenizer: PromptTokenizer, room: int) -> QuestionSet:
    questions = read_questions(part.file, job.extent.questions)
    return QuestionSet(part.kind, questions, tuple(requests_of(questions, tokenizer, job.extent, room)))


def _max_context(folder: Path) -> int:
    path = folder / "config.json"
    if not path.is_file():
        return DEFAULT_CONTEXT
    return ModelShape.from_config(read_json(path)).max_context
