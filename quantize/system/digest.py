"""Names by content: the text of a digest, its short form in folders and tags, and how one is computed.

In: bytes, or JSON data. Out: "sha256:" and 64 hex digits. Wherever something is named by what it holds, it is by these
rules; hashing files is left to the cache, which remembers them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

PREFIX = "sha256:"
SHORT_DIGITS = 12  # of a digest, in the names of folders and tags; also the least that a pin may have
FIELD = "digest"  # of a document that states its own
# As text for regular expressions: a whole digest; one that may be cut short, as pins have it.
WHOLE = rf"{PREFIX}[0-9a-f]{{64}}"
PIN = rf"{PREFIX}[0-9a-f]{{{SHORT_DIGITS},64}}"
_START = re.compile(r"[0-9a-f]{4,64}")
_SHORT = re.compile(rf"[0-9a-f]{{{SHORT_DIGITS}}}")


def canonical_json(data: Any) -> bytes:
    """RFC 8785: one text for the same data. Raises ValueError: NaN, or a number that JSON has no exact words for."""
    import rfc8785

    return rfc8785.dumps(data)


def canonical_hash(data: Any) -> str:
    """Hex sha256 of data in canonical JSON. Raises ValueError as canonical_json does."""
    return hashlib.sha256(canonical_json(data)).hexdigest()


def digest_of(data: bytes) -> str:
    """The digest of some bytes."""
    return from_digits(hashlib.sha256(data).hexdigest())


def document_digest(fields: Mapping[str, Any]) -> str:
    """The digest that a document states of itself: of all its fields but that one. Raises ValueError."""
    return from_digits(canonical_hash({key: value for key, value in fields.items() if key != FIELD}))


def from_digits(sha256: str) -> str:
    """A digest from its hex digits."""
    return PREFIX + sha256


def digits(digest: str) -> str:
    """The hex digits of a digest, or of what somebody wrote for one, with or without the prefix."""
    return digest.removeprefix(PREFIX)


def short(digest: str) -> str:
    """The short form: what folders and tags are named by."""
    return digits(digest)[:SHORT_DIGITS]


def is_whole(text: str) -> bool:
    """Whether it is a digest with all its digits."""
    return re.fullmatch(WHOLE, text) is not None


def is_pin(text: str) -> bool:
    """Whether it is a digest with at least SHORT_DIGITS of its digits."""
    return re.fullmatch(PIN, text) is not None


def is_short(name: str) -> bool:
    """Whether a folder's name can be a short form."""
    return _SHORT.fullmatch(name) is not None


def is_start(text: str) -> bool:
    """Whether it can be the first digits of a digest, as people type them."""
    return _START.fullmatch(digits(text)) is not None


def starts(digest: str, text: str) -> bool:
    """Whether a digest begins with the digits that somebody typed."""
    return digits(digest).startswith(digits(text))
