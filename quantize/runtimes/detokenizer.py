"""From tokens to text as they come: a character is given when it is whole.

In: tokens, or the bytes that each stands for. Out: text. What may be sent of it is left to the gateway.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Protocol


class Detokenizer(Protocol):
    """Turns tokens into text as they come; holds back characters that are not whole yet."""

    def add(self, token: int) -> str:
        """Text that is whole with this token."""

    def flush(self) -> str:
        """What is left at the end."""


class BytePieces:
    """A Detokenizer for vocabularies whose tokens are bytes."""

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """See Detokenizer."""
        return self._decoder.decode(self._piece(token))

    def flush(self) -> str:
        """See Detokenizer."""
        return self._decoder.decode(b"", final=True)
