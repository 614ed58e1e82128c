"""Held-out text -> windows of token ids that an artifact and its source are both measured on.

In: `python-docs`, or a .txt, .jsonl, .json or .parquet file; a tokenizer. Out: Windows, pinned by their hashes. Which
texts there are is kinds.py's, and what the source itself writes is chat.py's. It refuses text that is empty, shorter
than a window, or part of what the artifact was calibrated on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantize.calibration.datasets import find_held_out
from quantize.errors import RefusedError, UsageError

DEFAULT_WINDOW = 512
SHINGLE_TOKENS = 32  # a run of as many equal tokens is no coincidence in prose
MAX_OVERLAP = 0.01
SHORTEST_DOCUMENT = 16

Encoder = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class HeldOutText:
    """Text to measure on. stream: the documents are one text, cut end to end; else each gives at most one window."""

    name: str
    documents: tuple[str, ...]
    stream: bool

    @property
    def hash(self) -> str:
        """Hex sha256 over the documents, each with its length in bytes."""
        digest = hashlib.sha256()
        for document in self.documents:
            raw = document.encode("utf-8", "surrogatepass")
            digest.update(len(raw).to_bytes(8, "little") + raw)
        return digest.hexdigest()


@dataclass(frozen=True)
class Windows:
    """Token ids, one tuple a window of at most `length` tokens; `text_name` and `text_hash` say of what text.

    kinds: the kind of text of each window. starts: where in each window the first token is that counts as predicted;
    what is before it is given, as the question before an answer is.
    """

    token_ids: tuple[tuple[int, ...], ...]
    length: int
    text_name: str
    text_hash: str
    kinds: tuple[str, ...]
    starts: tuple[int, ...]

    @classmethod
    def of_one_kind(cls, token_ids: Iterable[Sequence[int]], length: int, text: HeldOutText, kind: str = "") -> Windows:
        """Windows of text in which all but the first token are predicted."""
        ids = tuple(map(tuple, token_ids))
        return cls(ids, length, text.name, text.hash, (kind,) * len(ids), (1,) * len(ids))

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each window that are predicted."""
        return tuple(len(ids) - start for ids, start in zip(self.token_ids, self.starts, strict=True))

    @property
    def predictions(self) -> int:
        """Tokens that are predicted."""
        return sum(self.counts)

    @property
    def hash(self) -> str:
        """Hex sha256 over the token ids, their grouping, and which of them are predicted."""
        return hashlib.sha256(json.dumps([self.token_ids, self.starts]).encode()).hexdigest()


def joined(parts: Sequence[Windows], name: str) -> Windows:
    """Windows of several kinds of text as one. name: of all of them together."""
    if len(parts) == 1:
        return parts[0]
    digest = hashlib.sha256(json.dumps([[part.kinds[:1], part.text_hash] for part in parts]).encode()).hexdigest()
    return Windows(
        tuple(ids for part in parts for ids in part.token_ids), max(part.length for part in parts), name, digest,
        tuple(kind for part in parts for kind in part.kinds), tuple(start for part in parts for start in part.starts),
    )  # fmt: skip


def load_text(source: str, base: Path, *, column: str = "text") -> HeldOutText:
    """Read held-out text: `python-docs`, or a file relative to `base`.

    A .txt file is one text; the rows of a .jsonl, .json or .parquet file are taken from `column`.
    Raises UsageError: the file is missing, or holds no text. RecipeError: it can't be read, or has no such column.
    """
    found = find_held_out(source, base, column)
    if found is None:
        hint = "give a .txt, .jsonl, .json or .parquet file, or python-docs"
        raise UsageError(f"{source}: no such text file", hint=hint)
    documents = tuple(row for row in found.documents if isinstance(row, str) and row.strip())
    if not documents:
        raise UsageError(f"{source}: no text to measure on", hint=f"the file is empty, or `{column}` holds no text")
    return HeldOutText(found.name, documents, found.stream)


def cut_windows(
    text: HeldOutText, encode: Encoder, *, prefix: Sequence[int] = (), window: int = DEFAULT_WINDOW, limit: int = 0,
    kind: str = "",
) -> Windows:  # fmt: skip
    """Tokenize and cut. encode: without special tokens. prefix: what the model wants before any text (its BOS token).

    window: tokens, prefix included. limit: at most so many windows, the first ones; 0 takes all. The end of a stream
    that does not fill a window is left out. Raises UsageError: no text, or less than one window of it.
    """
    if window < len(prefix) + 2:
        raise UsageError(f"a window of {window} tokens predicts nothing", hint="use at least 16 tokens")
    room = window - len(prefix)
    pieces: list[Sequence[int]]
    if text.stream:
        ids = [token for part in _joined(text.documents) for token in encode(part)]
        pieces = [ids[start : start + room] for start in range(0, len(ids) - room + 1, room)]
        longest = len(ids)
    else:
        encoded = [encode(document)[:room] for document in text.documents]
        longest = max((len(ids) for ids in encoded), default=0)
        pieces = [ids for ids in encoded if len(ids) >= SHORTEST_DOCUMENT]
    if longest == 0:
        raise UsageError(f"{text.name}: no text to measure on")
    if not pieces:
        raise UsageError(
            f"{text.name}: {longest} tokens are less than one window of {window}",
            hint="give more text, or a smaller window",
        )
    kept = [(*prefix, *ids) for ids in (pieces[:limit] if limit else pieces)]
    return Windows.of_one_kind(kept, window, text, kind)


def check_disjoint(windows: Windows, calibration: Iterable[Sequence[int]]) -> None:
    """Refuse text that the artifact was calibrated on.

    Compares hashes of every run of 32 tokens in the calibration sequences with those in the windows; up to 1 % in
    common is let pass (licences and tables repeat). Raises RefusedError with the share.
    """
    seen = {shingle for ids in calibration for shingle in _shingles(ids)}
    wanted = [shingle for ids in windows.token_ids for shingle in _shingles(ids)]
    share = sum(shingle in seen for shingle in wanted) / max(1, len(wanted))
    if share > MAX_OVERLAP:
        raise RefusedError(
            f"{windows.text_name}: {share:.0%} of the held-out text was calibrated on; the figures would flatter",
            hint="measure on other text, or calibrate on other text",
        )


def _joined(documents: tuple[str, ...]) -> Iterable[str]:
    for index, document in enumerate(documents):
        yield document if index == 0 else "\n\n" + document


def _shingles(ids: Sequence[int]) -> Iterable[bytes]:
    """Hashes of all runs of 32 tokens; a shorter sequence is one run."""
    runs = max(1, len(ids) - SHINGLE_TOKENS + 1)
    for start in range(runs):
        run = ids[start : start + SHINGLE_TOKENS]
        yield hashlib.blake2b(b"".join(int(token).to_bytes(4, "little") for token in run), digest_size=8).digest()
