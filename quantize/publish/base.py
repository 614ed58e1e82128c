"""What a target is to those who send and fetch: one place in it, for one artifact.

In: blobs and a manifest. Out: a publication that is complete before anything names it. Whether to send, what to check
and what to say is for `send` and `receive`; a place moves bytes, and tries again while that may help. A new kind of
place is a module with a class of this form, and a line in KINDS of `places`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quantize.errors import RefusedError, VerifyError
from quantize.publish.pack import Blob, Pack
from quantize.publish.retry import Retry
from quantize.system.digest import WHOLE

DIGEST_END = re.compile(rf"@({WHOLE})$")
Count = Callable[[int], None]
"""Told how many more bytes have moved; fewer than none where a blob starts over. May raise, to end the work."""


class Place(Protocol):
    """Where an artifact is, or will be. Every method may raise TransferError; those that read, VerifyError too.

    by_content: blobs with the same digest are the same blob there.
    """

    by_content: bool

    @classmethod
    def to_publish(cls, target: str, name: str, variant: str, retry: Retry) -> Place:
        """Where an artifact goes in a target; below it, at a place of its own, if the target names none.

        Raises UsageError: not a target of this kind.
        """

    @classmethod
    def to_fetch(cls, reference: str, retry: Retry) -> Found:
        """What a reference means. Raises UsageError: not one of this kind."""

    @property
    def name(self) -> str:
        """The reference whose meaning may move, as a user writes it."""

    @property
    def title(self) -> str:
        """What the model is called there: some licences have a word in that."""

    def pinned(self, digest: str) -> str:
        """The reference that always means the publication with this digest."""

    def tagged(self) -> str | None:
        """The digest that `name` means now; None if it means nothing."""

    def manifest(self, digest: str) -> bytes:
        """What is said to be the manifest with this digest; the caller checks it. Raises VerifyError: there is none."""

    def has(self, blob: Blob, pack: Pack) -> bool:
        """Whether a blob is there, so that it need not be sent."""

    def send(self, blob: Blob, source: Path, pack: Pack, count: Count) -> None:
        """Put one blob there. May be called from several threads."""

    def takes(self, blob: Blob, pack: Pack) -> int:
        """Bytes that a blob which is not there would take."""

    def free_bytes(self) -> int | None:
        """Bytes that can still be put there; None where nobody says."""

    def known(self) -> list[str]:
        """References that mean something there, to tell whoever asked for one that means nothing; some, sorted."""

    def seal(self, pack: Pack, *, move_from: str | None) -> str:
        """Put the manifest, when every blob is there, and have `name` mean it. Returns the pinned reference.

        move_from: what `name` meant when this was last looked at. Raises RefusedError: it means something else by now,
        and not this publication either.
        """

    def fetch(self, blob: Blob, target: Path, pack: Pack, count: Count) -> None:
        """Get one blob into a file, on from what is in the file. The caller checks it. From several threads."""

    def close(self) -> None:
        """Close what is open."""


def moved_meanwhile(name: str, meant: str | None, now: str | None) -> RefusedError:
    """Somebody else has moved a tag while something was published to it."""
    return RefusedError(
        f"{name} was moved by someone else meanwhile: it meant {meant or 'nothing'}, now {now or 'nothing'}",
        hint="see who else publishes there, then run the same command again",
    )


@dataclass(frozen=True)
class Found:
    """What a reference means. digest: the one in it; and_name: it gives a tag beside the digest, which must agree."""

    place: Place
    digest: str | None
    and_name: bool = False


def split_digest(reference: str) -> tuple[str, str | None]:
    """A reference without the digest at its end, and the digest; None if it has none."""
    match = DIGEST_END.search(reference)
    return (reference[: match.start()], match[1]) if match else (reference, None)


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def write_stream(target: Path, chunks: Iterable[bytes], blob: Blob, count: Count, *, append: bool) -> None:
    """Write what comes, counting it. Raises VerifyError: more comes than the blob has."""
    with target.open("ab" if append else "wb") as file:
        at = file.tell()
        for chunk in chunks:
            at += len(chunk)
            if at > blob.size_bytes:
                raise VerifyError(f"{blob.path}: more comes than the {blob.size_bytes:,} bytes that it has")
            file.write(chunk)
            count(len(chunk))
