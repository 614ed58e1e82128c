"""The `evaluation` section of a recipe: what an artifact and its source are both measured on, and how much of it.

In: a recipe's section. Out: EvaluationSpec; its `extent` has a number for all that the recipe leaves open. Which texts
there are, and where, is evaluate/kinds.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from quantize.recipe.yaml import STRICT

MIXED = "mixed"
Engine = Literal["auto", "runtime", "streamed"]
KindName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,15}$")]


class Effort(StrEnum):
    """How much is measured where the recipe gives no numbers."""

    FULL = "full"
    QUICK = "quick"


@dataclass(frozen=True)
class Extent:
    """How much is measured. window: tokens that are read at a time. windows: of each kind at most, 0 for all.

    questions: that the source answers for its own text, at most. answer_tokens: of each answer at most.
    """

    window: int
    windows: int
    questions: int
    answer_tokens: int


EXTENTS = {
    Effort.FULL: Extent(window=512, windows=0, questions=64, answer_tokens=160),
    Effort.QUICK: Extent(window=256, windows=4, questions=12, answer_tokens=48),
}


class Questions(BaseModel):
    """Text that the source itself writes."""

    model_config = STRICT
    questions: str = Field(description="file of questions, one a line, which the source answers greedily")


class TaskEntry(BaseModel):
    """One task of lm-evaluation-harness, its own or one in a file, and how much of it."""

    model_config = STRICT
    task: str | None = Field(default=None, description="a task of lm-evaluation-harness by its name: `arc_easy`")
    file: str | None = Field(
        default=None, description="a task file of your own, as the harness has them, over a local data set"
    )
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = Field(
        default=None, description="commit of the task's data set on the hub; needed unless its data are local files"
    )
    limit: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="at most so many samples, the first ones (default: all)"
    )
    shots: Annotated[int, Field(ge=0, le=64)] | None = Field(
        default=None, description="solved examples before each question (default: the task's own)"
    )
    chat: bool = Field(default=False, description="ask through the source's chat template")
    metric: str | None = Field(
        default=None, description="which of the task's metrics the gate looks at (default: its first)"
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> TaskEntry:
        if (self.task is None) == (self.file is None):
            raise ValueError("a task has a `task`, its name in the harness, or a `file`, and not both || write one")
        if self.task is not None and self.revision is None:
            raise ValueError(
                f"`{self.task}` without the commit of its data set is another task tomorrow || write "
                f"{{task: {self.task}, revision: <40 hex digits, the commit of its data set on the hub>}}"
            )
        return self

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.task or self.file or ""


class EvaluationSpec(BaseModel):
    """What an artifact and its source are both measured on. Nothing here changes what is built."""

    model_config = STRICT
    text: str | Annotated[dict[KindName, str | Questions], Field(min_length=1, max_length=16)] = Field(
        default=MIXED,
        description="held-out text: `mixed` (English prose, code, chat, Vietnamese), one of its kinds, `python-docs`, "
        "a .txt, .jsonl, .json or .parquet file; or {name: text} for kinds of your own",
    )
    column: str = Field(default="text", description="column of a .jsonl, .json or .parquet file that holds the text")
    effort: Annotated[Effort, Field(strict=False)] = Field(
        default=Effort.FULL, description="`quick` measures about a ninth of the text, with wider intervals"
    )
    window: Annotated[int, Field(ge=16, le=131_072)] | None = Field(
        default=None, description="tokens that are read at a time (default: 512; 256 with `effort: quick`)"
    )
    windows: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="at most so many windows of each kind, the first ones; 0 takes all (default: all; 4 with quick)",
    )
    golden: list[str] | None = Field(
        default=None,
        description="files, names or folders of golden prompts; [] asks none (default: calibration/golden)",
    )
    context: Annotated[int, Field(ge=0)] = Field(
        default=0, description="tokens of a golden prompt and its answer; 0 for the model's own, at most 2,048"
    )
    tasks: Annotated[list[TaskEntry], Field(max_length=64)] = Field(
        default=[], description="tasks of lm-evaluation-harness (extra `tasks`), for source and artifact"
    )
    engine: Engine = Field(
        default="auto",
        description="auto reads block by block what does not fit in memory; streamed whatever can be; runtime nothing",
    )

    @property
    def extent(self) -> Extent:
        """Numbers for all that is measured."""
        found = EXTENTS[self.effort]
        windows = found.windows if self.windows is None else self.windows
        questions = min(found.questions, windows) if self.windows else found.questions
        return Extent(self.window or found.window, windows, questions, found.answer_tokens)
