"""What is asked: shapes of prompts and answers, and prompts that no cache has seen.

In: a shape ("short", or "512:64" in tokens), a number. Out: text of about so many tokens, the same for the same number.
Each prompt starts with words of its own, so that a server's prefix cache helps none of them.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

from quantize.errors import UsageError

MAX_TOKENS = 1_000_000
TOKENS_A_WORD = 1.4
"""Of English text in today's vocabularies; used where a server does not count tokens."""

_WORDS = (
    "river", "market", "winter", "engine", "garden", "letter", "window", "station", "bridge", "harvest", "captain",
    "kitchen", "mountain", "signal", "paper", "village", "doctor", "island", "thunder", "copper", "question",
    "journey", "shadow", "library", "morning", "orchard", "compass", "harbor", "lantern", "meadow", "pocket",
    "railway", "salt", "timber", "valley", "weather", "anchor", "basket", "candle", "desert", "evening", "feather",
    "granite", "hammer", "ladder", "mirror", "needle", "ocean", "pepper", "quarry", "ribbon", "silver", "teacher",
    "umbrella", "velvet", "whistle", "yellow", "zebra", "answer", "because", "between", "carries", "describes",
    "every", "finds", "follows", "gives", "inside", "keeps", "leaves", "makes", "near", "often", "over", "reaches",
    "seldom", "shows", "since", "through", "toward", "under", "until", "what", "where", "while", "without", "writes",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """How long prompts and answers are, in tokens; a model may end its answer earlier."""

    name: str
    prompt_tokens: int
    output_tokens: int


SHAPES = (
    Shape("short", 64, 32),
    Shape("long-prompt", 1024, 32),
    Shape("long-answer", 256, 256),
)


def parse_shape(text: str) -> Shape:
    """A shape by its name, or `PROMPT:ANSWER` in tokens. Raises UsageError."""
    for shape in SHAPES:
        if text == shape.name:
            return shape
    match = re.fullmatch(r"(\d{1,7}):(\d{1,7})", text)
    if match is None or not all(0 < int(number) <= MAX_TOKENS for number in match.groups()):
        names = ", ".join(shape.name for shape in SHAPES)
        raise UsageError(f"{text!r} is no shape", hint=f"use {names}, or tokens in and out, such as 512:64")
    return Shape(text, int(match.group(1)), int(match.group(2)))


@dataclass(frozen=True)
class TokenRule:
    """Tokens of a prompt = fixed + a_word x words: what a server's own count says, or a guess."""

    fixed: float = 0.0
    a_word: float = TOKENS_A_WORD

    @classmethod
    def from_counts(cls, few: tuple[int, int], many: tuple[int, int]) -> TokenRule:
        """From two prompts, each (words, tokens)."""
        slope = (many[1] - few[1]) / (many[0] - few[0])
        return cls(few[1] - slope * few[0], slope) if slope > 0 else cls()

    def words(self, tokens: int) -> int:
        """Words of a prompt of about so many tokens."""
        return max(1, round((tokens - self.fixed) / self.a_word))


def words_text(words: int, seed: str) -> str:
    """So many words, chosen by the seed."""
    chosen = random.Random(seed)
    return " ".join(chosen.choice(_WORDS) for _ in range(words))


def prompt(shape: Shape, number: int, rule: TokenRule, seed: int = 0) -> str:
    """Prompt `number` of a shape."""
    return words_text(rule.words(shape.prompt_tokens), f"{seed}:{shape.name}:{number}")


def prompts_hash(shapes: Iterable[Shape], requests: int, rule: TokenRule, seed: int) -> str:
    """sha256 of the prompts of a cell of each shape."""
    digest = hashlib.sha256()
    for shape in shapes:
        for number in range(requests):
            digest.update(prompt(shape, number, rule, seed).encode() + b"\0")
    return digest.hexdigest()
