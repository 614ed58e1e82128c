"""Any fsspec URL as a target, such as s3://BUCKET/PATH: the files of a publication as objects, laid out as in a folder.

In: blobs and a manifest. Out: objects; modelpack.json is put last, and until it is there nothing was published. What
opens the URL, and with which credentials, is for fsspec and its plugin (s3fs, gcsfs, adlfs …).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantize.errors import MissingExtraError, TransferError, UsageError, VerifyError, first_line
from quantize.publish.base import Count, Found, moved_meanwhile, size_of, write_stream
from quantize.publish.folder import CURRENT, READ_BYTES, checked_digest, find_in_tree, missing
from quantize.publish.pack import MANIFEST_NAME, Blob, Pack
from quantize.publish.retry import Again, Retry, persist
from quantize.system.digest import short

try:
    import fsspec
    from fsspec.callbacks import Callback
except ImportError as exc:
    raise MissingExtraError("this kind of target", "publish") from exc

FINAL = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, NotImplementedError)


class FilesystemPlace:
    """One variant's objects under a URL."""

    by_content = False

    def __init__(self, url: str, retry: Retry) -> None:
        self._url, self._retry = url.rstrip("/"), retry
        try:
            self._system, self._root = fsspec.core.url_to_fs(self._url)
        except (ValueError, ImportError) as exc:
            hint = "is the scheme one that fsspec knows? `quantize publish --help` names the others"
            raise UsageError(f"{url!r} can't be opened: {first_line(exc)}", hint=hint) from exc
        self._system.invalidate_cache()

    @classmethod
    def to_publish(cls, target: str, name: str, variant: str, retry: Retry) -> FilesystemPlace:
        """See Place."""
        return cls(f"{target.rstrip('/')}/{name}/{variant}", retry)

    @classmethod
    def to_fetch(cls, reference: str, retry: Retry) -> Found:
        """See Place."""
        return find_in_tree(reference, lambda text: cls(text, retry))

    def close(self) -> None:
        """Nothing is open."""

    @property
    def name(self) -> str:
        """The URL."""
        return self._url

    @property
    def title(self) -> str:
        """The recipe's folder under the URL."""
        return str(self._root).rpartition("/")[0].rpartition("/")[2]

    def pinned(self, digest: str) -> str:
        """The URL and a digest."""
        return f"{self._url}@{digest}"

    def _path(self, digest: str, name: str) -> str:
        return f"{self._root}/{short(digest)}/{name}"

    def tagged(self) -> str | None:
        """What `current` says."""
        data = self._read(f"{self._root}/{CURRENT}")
        return None if data is None else checked_digest(data, self.name)

    def manifest(self, digest: str) -> bytes:
        """The bytes of modelpack.json. Raises VerifyError: not there."""
        data = self._read(self._path(digest, MANIFEST_NAME))
        if data is None:
            raise missing(self.pinned(digest))
        return data

    def _read(self, path: str) -> bytes | None:
        def step() -> bytes | None:
            with _errors(path), contextlib.suppress(FileNotFoundError):
                return bytes(self._system.cat_file(path))
            return None

        return persist(step, self._retry, self._url)

    def has(self, blob: Blob, pack: Pack) -> bool:
        """Whether an object is there with the file's size; stores of objects keep no half ones."""

        def step() -> bool:
            path = self._path(pack.digest, blob.path)
            with _errors(path), contextlib.suppress(FileNotFoundError):
                return bool(self._system.info(path)["size"] == blob.size_bytes)
            return False

        return persist(step, self._retry, self._url)

    def send(self, blob: Blob, source: Path, pack: Pack, count: Count) -> None:
        """Put one file."""
        path = self._path(pack.digest, blob.path)

        def step() -> None:
            told = _Told(count)
            try:
                with _errors(path):
                    self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
                    self._system.put_file(str(source), path, callback=told)
            except Again:
                count(-told.bytes)
                raise
            count(blob.size_bytes - told.bytes)

        persist(step, self._retry, self._url)

    def takes(self, blob: Blob, pack: Pack) -> int:
        """All of it."""
        return blob.size_bytes

    def free_bytes(self) -> int | None:
        """Stores of objects have no end."""
        return None

    def known(self) -> list[str]:
        """Variants below the recipe's part of the URL, or those of all recipes."""

        def step() -> list[str]:
            with _errors(self._root), contextlib.suppress(FileNotFoundError):
                depths = (f"{self._root}/*/{CURRENT}", f"{self._root}/*/*/{CURRENT}")
                found = [path for pattern in depths for path in self._system.glob(pattern)]
                below = [str(path).removeprefix(str(self._root)).removesuffix(f"/{CURRENT}") for path in found]
                return sorted(self._url + path for path in below)
            return []

        return persist(step, self._retry, self._url)

    def seal(self, pack: Pack, *, move_from: str | None) -> str:
        """Put modelpack.json, then `current`.

        The first `current` is made only if there is none, in one step where the plugin can do that; one that is moved
        is looked at right before.
        """
        self._write(self._path(pack.digest, MANIFEST_NAME), pack.document)
        pointer, data = f"{self._root}/{CURRENT}", f"{pack.digest}\n".encode()
        now = self.tagged()
        if now is None and move_from is None and not self._write(pointer, data, anew=True):
            now = self.tagged()
        if now is not None and now != pack.digest:
            if now != move_from:
                raise moved_meanwhile(self.name, move_from, now)
            self._write(pointer, data)
        return self.pinned(pack.digest)

    def _write(self, path: str, data: bytes, *, anew: bool = False) -> bool:
        """Put an object; anew: only if there is none. Whether it was put."""

        def step() -> bool:
            with _errors(path):
                try:
                    self._system.pipe_file(path, data, mode="create" if anew else "overwrite")
                except FileExistsError:
                    return False
            return True

        return persist(step, self._retry, self._url)

    def fetch(self, blob: Blob, target: Path, pack: Pack, count: Count) -> None:
        """Read one object, on from what is in the file."""
        path = self._path(pack.digest, blob.path)

        def step() -> None:
            start = size_of(target)
            try:
                with _errors(path), self._system.open(path, "rb") as file:
                    file.seek(start)
                    chunks = iter(lambda: file.read(READ_BYTES), b"")
                    write_stream(target, chunks, blob, count, append=True)
            except FileNotFoundError:
                raise VerifyError(f"{path} is missing", hint="publish the artifact again") from None
            except Again as again:
                again.moved = size_of(target) > start
                raise

        persist(step, self._retry, self._url)


class _Told(Callback):  # type: ignore[misc]
    """Hands on how many bytes fsspec has moved."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.bytes = 0
        self._count = count

    def relative_update(self, inc: int = 1) -> None:
        """So many more."""
        self.bytes += inc
        self._count(inc)

    def call(self, *args: Any, **kwargs: Any) -> None:
        """Nothing else to tell."""


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except FINAL as exc:
        raise TransferError(f"{path}: {first_line(exc)}", hint="check the plugin's credentials and rights") from exc
    except OSError as exc:
        raise Again(first_line(exc)) from exc
