"""The text that the source writes itself: its greedy answers to questions, token by token as it gave them.

In: a file of questions, the source's tokenizer. Out: requests for a Runtime; with the answers, Windows in which only
the answer counts as predicted. Artifacts read them as they read any text ("teacher-forced"), so that they are measured
where the model really goes, and each on the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantize.errors import UsageError
from quantize.evaluate.prompts import PromptTokenizer
from quantize.evaluate.text import HeldOutText, Windows
from quantize.recipe.evaluation import Extent
from quantize.runtimes.base import Prompted
from quantize.system.untrusted import read_limited

MAX_BYTES = 1 << 20
LEAST_ANSWER = 2  # tokens; of less nothing is learned


def read_questions(path: Path, most: int) -> tuple[str, ...]:
    """The first lines of a file that are not empty. Raises UsageError: there are none, or it is no text."""
    try:
        lines = read_limited(path, MAX_BYTES).decode("utf-8").splitlines()
    except (OSError, ValueError) as exc:
        raise UsageError(f"{path}: can't be read as questions ({exc})", hint="one question a line, in UTF-8") from exc
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise UsageError(f"{path}: no questions", hint="one question a line")
    return found[:most]


def requests_of(questions: Sequence[str], tokenizer: PromptTokenizer, extent: Extent, room: int) -> list[Prompted]:
    """One request a question, with the chat template if there is one; those that leave no room for an answer are left
    out. room: tokens of question and answer together.
    """
    asked = (tuple(tokenizer.chat(question, None)) for question in questions)
    return [
        Prompted(ids, min(extent.answer_tokens, room - len(ids)), tokenizer.stop)
        for ids in asked
        if room - len(ids) >= LEAST_ANSWER
    ]


def answered_windows(
    requests: Sequence[Prompted], answers: Sequence[Sequence[int]], questions: Sequence[str], kind: str
) -> Windows | None:
    """One window an answer, in which only the answer is predicted; None if the source answers nothing."""
    pairs = [
        (request.token_ids, answer)
        for request, answer in zip(requests, answers, strict=True)
        if len(answer) >= LEAST_ANSWER
    ]
    if not pairs:
        return None
    ids = tuple((*asked, *answer) for asked, answer in pairs)
    text = HeldOutText("questions", tuple(questions), stream=False)
    return Windows(
        ids, max(map(len, ids)), text.name, text.hash, (kind,) * len(ids), tuple(len(asked) for asked, _ in pairs)
    )
