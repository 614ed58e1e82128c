"""`self-chat`: the model's own answers to the questions of chat_questions.txt, through its own chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from quantize.calibration.datasets.base import Dataset, TokenIds
from quantize.calibration.datasets.own_writing import OwnWriting

NAME = "self-chat"


class OwnChat(Dataset):
    """Token ids of chats, as the model sees them when it is asked; pinned by the questions and the model.

    A model without a chat template gets each question as a line of text.
    """

    made_to_spec: ClassVar[bool] = True
    holds_the_model: ClassVar[bool] = True
    not_compared: ClassVar[str | None] = OwnWriting.not_compared

    def knows(self) -> bool:
        """One name."""
        return self.spec.dataset == NAME

    def rows(self, model: Path) -> Iterable[TokenIds]:
        """As many as the spec has samples, of its length each. Loads the whole model."""
        from quantize.runtimes.sampling import chat_with_model

        spec = self.spec
        rows = chat_with_model(model, questions(), spec.samples, spec.sequence_length, spec.seed)
        return [tuple(ids) for ids in rows]

    def content(self) -> str:
        """Hex sha256 of the questions."""
        return hashlib.sha256("\n".join(questions()).encode()).hexdigest()


def questions() -> list[str]:
    """What a model is asked for its own calibration text, one a line."""
    path = Path(__file__).with_name("chat_questions.txt")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
