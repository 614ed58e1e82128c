"""A kind of place as somebody else would write it: drawer://NAME, in memory."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from quantize.errors import VerifyError
from quantize.publish.base import Count, Found, moved_meanwhile, size_of, split_digest, write_stream
from quantize.publish.pack import MANIFEST_NAME, Blob, Pack
from quantize.publish.retry import Retry


@dataclass
class Drawer:
    """What one drawer holds: bytes by publication and path, and what its name means."""

    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    meant: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


DRAWERS: dict[str, Drawer] = {}


class DrawerPlace:
    """See Place."""

    by_content = False

    def __init__(self, name: str) -> None:
        self._name = name
        self._drawer = DRAWERS.setdefault(name, Drawer())

    @classmethod
    def to_publish(cls, target: str, name: str, variant: str, retry: Retry) -> DrawerPlace:  # noqa: ARG003 - nothing fails
        return cls(f"{target}/{name}/{variant}")

    @classmethod
    def to_fetch(cls, reference: str, retry: Retry) -> Found:  # noqa: ARG003 - nothing fails
        name, digest = split_digest(reference)
        return Found(cls(name), digest)

    @property
    def name(self) -> str:
        return self._name

    @property
    def title(self) -> str:
        return self._name.split("/")[-2]

    def pinned(self, digest: str) -> str:
        return f"{self._name}@{digest}"

    def tagged(self) -> str | None:
        return self._drawer.meant

    def manifest(self, digest: str) -> bytes:
        try:
            return self._drawer.files[digest, MANIFEST_NAME]
        except KeyError:
            raise VerifyError(f"{self.pinned(digest)}: there is no such publication") from None

    def has(self, blob: Blob, pack: Pack) -> bool:
        return (pack.digest, blob.path) in self._drawer.files

    def send(self, blob: Blob, source: Path, pack: Pack, count: Count) -> None:
        self._drawer.files[pack.digest, blob.path] = source.read_bytes()
        count(blob.size_bytes)

    def takes(self, blob: Blob, pack: Pack) -> int:
        return blob.size_bytes

    def free_bytes(self) -> int | None:
        return None

    def known(self) -> list[str]:
        return sorted(name for name, drawer in DRAWERS.items() if drawer.meant)

    def seal(self, pack: Pack, *, move_from: str | None) -> str:
        with self._drawer.lock:
            if self._drawer.meant not in (move_from, pack.digest):
                raise moved_meanwhile(self._name, move_from, self._drawer.meant)
            self._drawer.files[pack.digest, MANIFEST_NAME] = pack.document
            self._drawer.meant = pack.digest
        return self.pinned(pack.digest)

    def fetch(self, blob: Blob, target: Path, pack: Pack, count: Count) -> None:
        data = self._drawer.files[pack.digest, blob.path][size_of(target) :]
        write_stream(target, [data], blob, count, append=True)

    def close(self) -> None:
        pass
