"""What a kind of dataset is: how its text is pinned, named in build keys, read, and measured on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from quantize.errors import RecipeError
from quantize.events import Reporter
from quantize.recipe.calibration import CalibrationSpec
from quantize.runtimes.devices import CPU

TokenIds = tuple[int, ...]
Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """Messages with role and content, and the tools that they may call.

    where: the file and line, or number, that an error names. plain: the same as a text, for a model without a chat
    template; None where it is nothing without one.
    """

    messages: list[Message]
    tools: tuple[dict[str, Any], ...] = ()
    where: str = "calibration"
    plain: str | None = None


Row = str | Chat | list[Message] | TokenIds | None
"""A text; a chat, or its messages; token ids of the model; None for a row that holds nothing."""


@dataclass(frozen=True)
class HeldOutPart:
    """The text of a dataset that is measured on.

    name: as records have it. address: leads to it from any folder. file: what holds it. documents: read when they are
    asked for. stream: they are one text, cut end to end; else each is a text of its own.
    """

    name: str
    address: str
    file: Path
    documents: Iterable[Row]
    stream: bool


@dataclass(frozen=True)
class Dataset(ABC):
    """The dataset that a spec names, of the kind that knows it. base: the folder where relative paths start.

    device: that a model runs on which makes rows of it.
    """

    spec: CalibrationSpec
    base: Path
    device: str = CPU

    is_users_file: ClassVar[bool] = False
    """Whether it is a file of the user's, of which manifests have the name without its folder."""
    made_to_spec: ClassVar[bool] = False
    """Whether its rows are the spec's samples already: of their number and length, in their order."""
    holds_the_model: ClassVar[bool] = False
    """Whether its rows are made with the whole model in memory: in float32, or on a GPU as it is stored."""
    not_compared: ClassVar[str | None] = None
    """Why held-out text is not held against what was calibrated on; None: it is."""

    @abstractmethod
    def knows(self) -> bool:
        """Whether the spec names one of this kind."""

    @abstractmethod
    def rows(self, model: Path) -> Iterable[Row]:
        """All rows, in the dataset's own order. model: the folder of the model, for a dataset that is made with it.

        Raises RecipeError: it is missing or has no such column. CheckpointError: it can't be had. MissingExtraError.
        """

    def pin(self, reporter: Reporter) -> CalibrationSpec:
        """The spec with all that may move on resolved. Raises CheckpointError, MissingExtraError."""
        return self.spec

    def stated(self) -> dict[str, Any]:
        """The spec as manifests have it: nothing in it depends on this machine."""
        return self.spec.model_dump(mode="json")

    def content(self) -> str | None:
        """What tells its text from another of the same name; None: the spec does. Raises RecipeError, PlanError."""
        return None

    def identify(self) -> dict[str, Any]:
        """What pins the text before it is read, as build keys have it. Raises as `content` does."""
        content = self.content()
        return self.stated() if content is None else {**self.stated(), "content": content}

    def held_out(self) -> HeldOutPart | None:
        """What may be measured on; None: nothing of it. Raises RecipeError, PlanError."""
        return None


def no_column(where: str, column: str, columns: list[str]) -> RecipeError:
    """The error of a row, or a table, without the spec's column."""
    known = ", ".join(map(str, columns[:10]))
    hint = f"it has: {known}; say which: `column: NAME`" if columns else "each row must be an object"
    return RecipeError(f"{where}: no column `{column}`", hint=hint)
