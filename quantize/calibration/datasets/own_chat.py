"""`self-chat`: the model's own answers to the questions of chat_questions.txt, through its own chat template."""

from __future__ import annotations

from typing import ClassVar

from quantize.calibration.datasets.own_writing import OwnWriting, Writer, lines_of


class OwnChat(OwnWriting):
    """Token ids of chats, as the model sees them when it is asked; pinned by the questions and the model.

    A model without a chat template gets each question as a line of text.
    """

    name: ClassVar[str] = "self-chat"

    def prompts(self) -> list[str]:
        """The questions."""
        return questions()

    def writer(self) -> Writer:
        """Chats, one after the other."""
        from quantize.runtimes.sampling import chat_with_model

        return chat_with_model


def questions() -> list[str]:
    """What a model is asked for its own calibration text, one a line."""
    return lines_of("chat_questions.txt")
