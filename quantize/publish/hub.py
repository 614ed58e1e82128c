"""The Hugging Face Hub as a target: hf://ORG/NAME[@REVISION], one repository an artifact, by huggingface_hub.

In: blobs and a manifest. Out: one commit that holds all of them. Large files are sent before it, by the library, which
chooses Xet or LFS; what the repository has already is not sent. The login is the library's own (HF_TOKEN, hf auth).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from quantize.errors import MissingExtraError, TransferError, UsageError, VerifyError, first_line
from quantize.publish.base import Count, Found, moved_meanwhile
from quantize.publish.pack import MANIFEST_NAME, Blob, Pack
from quantize.publish.retry import Again, Retry, persist
from quantize.system.digest import PREFIX, WHOLE, digest_of

try:
    import huggingface_hub
    from huggingface_hub import errors as hub_errors
except ImportError as exc:
    raise MissingExtraError("the hub", "hub") from exc

Result = TypeVar("Result")
REFERENCE = re.compile(
    r"hf://(?P<repository>[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?)"
    rf"(?:@(?!{PREFIX})(?P<revision>[A-Za-z0-9][\w./-]*))?(?:@(?P<digest>{WHOLE}))?/?"
)
OWN = {".gitattributes"}  # what the hub itself puts into a repository
TRIES = 3  # the library tries most requests again by itself
MOVED = 412  # another commit came before: it is looked at anew
PASSING = {408, MOVED, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class HubReference:
    """A repository on the hub, a revision of it, and the digest of what must be there."""

    repository: str
    revision: str | None
    digest: str | None


def parse(text: str) -> HubReference:
    """Raises UsageError: not hf://ORG/NAME."""
    match = REFERENCE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not a place on the hub", hint="such as hf://me/model, or hf://me/model@REVISION")
    return HubReference(match["repository"], match["revision"], match["digest"])


class HubPlace:
    """One repository and revision. For whoever fetches, a revision is a commit from the first look at it on."""

    by_content = False

    def __init__(self, reference: HubReference, retry: Retry, *, write: bool) -> None:
        if "/" not in reference.repository:
            raise UsageError(f"hf://{reference.repository}: no repository", hint="such as hf://me/model")
        self._repository, self._revision = reference.repository, reference.revision or "main"
        self._retry, self._write = replace(retry, tries=min(retry.tries, TRIES)), write
        self._api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
        self._commit: str | None = None
        self._remote: dict[str, tuple[int, str | None]] = {}
        self._sealed: str | None = None
        self._ready: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._scratch = tempfile.TemporaryDirectory(prefix="quantize-hub-")
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()

    @classmethod
    def to_publish(cls, target: str, name: str, variant: str, retry: Retry) -> HubPlace:
        """See Place."""
        repository = parse(target)
        if "/" not in repository.repository:
            repository = parse(f"hf://{repository.repository}/{name}-{variant}")
        return cls(repository, retry, write=True)

    @classmethod
    def to_fetch(cls, reference: str, retry: Retry) -> Found:
        """See Place."""
        repository = parse(reference)
        return Found(cls(repository, retry, write=False), repository.digest)

    def close(self) -> None:
        """Remove scratch files."""
        self._scratch.cleanup()

    @property
    def name(self) -> str:
        """The repository, and its revision if it is not main."""
        return f"hf://{self._repository}" + ("" if self._revision == "main" else f"@{self._revision}")

    @property
    def title(self) -> str:
        """The repository, without its owner."""
        return self._repository.rpartition("/")[2]

    def pinned(self, digest: str) -> str:
        """The repository at a commit, and the digest of what is there."""
        return f"hf://{self._repository}@{self._commit or self._revision}@{digest}"

    def tagged(self) -> str | None:
        """The digest of the newest commit's modelpack.json; that commit's id where others have committed files."""
        with contextlib.suppress(hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError):
            self._look()
            if MANIFEST_NAME in self._remote:
                self._sealed = digest_of(self._try(lambda: self._download(MANIFEST_NAME).read_bytes()))
                return self._sealed
            if self._write and set(self._remote) - OWN:
                return f"commit {self._commit}"
        return None

    def _look(self) -> None:
        info = self._try(lambda: self._api.model_info(self._repository, revision=self._revision, files_metadata=True))
        self._commit = info.sha
        self._remote = {
            item.rfilename: (item.size or 0, item.lfs.sha256 if item.lfs else None) for item in info.siblings or ()
        }

    def manifest(self, digest: str) -> bytes:
        """The bytes of modelpack.json. Raises VerifyError: not there."""
        try:
            if self._commit is None:
                self._look()
            return self._try(lambda: self._download(MANIFEST_NAME).read_bytes())
        except (hub_errors.EntryNotFoundError, hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError):
            hint = "it was not published by quantize, or needs a login (hf auth login)"
            raise VerifyError(f"{self.name}: no {MANIFEST_NAME} there", hint=hint) from None

    def _download(self, path: str) -> Path:
        folder = Path(self._scratch.name)
        return Path(self._api.hf_hub_download(self._repository, path, revision=self._commit, local_dir=folder))

    def has(self, blob: Blob, pack: Pack) -> bool:
        """Whether the newest commit has the file: by sha256 where the hub knows it, else as part of a publication."""
        size, sha256 = self._remote.get(blob.path, (-1, None))
        return size == blob.size_bytes and (sha256 == blob.sha256 or (sha256 is None and self._sealed == pack.digest))

    def send(self, blob: Blob, source: Path, pack: Pack, count: Count) -> None:
        """Send one file, if it is large; a small one is kept for the commit."""

        def step() -> Any:
            self._make_repository()
            entry = huggingface_hub.CommitOperationAdd(blob.path, str(source))
            self._api.preupload_lfs_files(self._repository, [entry], revision=self._revision, free_memory=False)
            return entry

        self._ready[blob.path] = self._try(step)
        count(blob.size_bytes)

    def _make_repository(self) -> None:
        with self._lock:
            if self._commit is None:
                self._api.create_repo(self._repository, private=True, exist_ok=True)
                self._commit = self._api.model_info(self._repository).sha

    def takes(self, blob: Blob, pack: Pack) -> int:
        """All of it."""
        return blob.size_bytes

    def free_bytes(self) -> int | None:
        """The hub says how much there is only when it is used up."""
        return None

    def known(self) -> list[str]:
        """None: the hub has a search of its own."""
        return []

    def seal(self, pack: Pack, *, move_from: str | None) -> str:
        """Commit everything at once, and remove what an earlier publication had.

        The commit names its parent, which is the one that was looked at: the hub refuses it where another came between.
        """
        wanted = {MANIFEST_NAME, *(blob.path for blob in pack.blobs)}

        def step() -> str:
            now = self.tagged()
            if now == pack.digest:
                return str(self._commit)  # this time, or the last one whose answer was lost
            if now != move_from:
                raise moved_meanwhile(self.name, move_from, now)
            stale = [path for path in self._remote if path not in wanted | OWN]
            manifest = huggingface_hub.CommitOperationAdd(MANIFEST_NAME, pack.document)
            removed = [huggingface_hub.CommitOperationDelete(path) for path in stale]
            done = self._api.create_commit(
                self._repository,
                [*self._ready.values(), manifest, *removed],
                commit_message=f"Publish {pack.digest}",
                revision=self._revision,
                parent_commit=self._commit,
            )
            return done.oid

        self._commit = self._try(step)
        return self.pinned(pack.digest)

    def fetch(self, blob: Blob, target: Path, pack: Pack, count: Count) -> None:
        """Download one file; the library goes on where it broke off."""
        try:
            path = self._try(lambda: self._download(blob.path))
        except hub_errors.EntryNotFoundError:
            raise VerifyError(f"{blob.path} is missing in {self.name}", hint="publish the artifact again") from None
        target.unlink(missing_ok=True)
        shutil.move(path, target)
        count(blob.size_bytes)

    def _try(self, step: Callable[[], Result]) -> Result:
        def guarded() -> Result:
            with _errors(self.name):
                return step()

        return persist(guarded, self._retry, self.name)


@contextlib.contextmanager
def _errors(name: str) -> Iterator[None]:
    """The library's errors as ours; those that say that something is not there pass."""
    import httpx2

    try:
        yield
    except (hub_errors.EntryNotFoundError, hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError) as exc:
        if isinstance(exc, hub_errors.LocalEntryNotFoundError):  # it could not ask
            raise Again(first_line(exc)) from exc
        raise
    except hub_errors.OfflineModeIsEnabled as exc:
        raise TransferError(f"{name}: the hub client is offline", hint="unset HF_HUB_OFFLINE") from exc
    except hub_errors.HfHubHTTPError as exc:
        status = exc.response.status_code if exc.response is not None else 0
        if status in PASSING:
            raise Again(f"status {status}") from exc
        hint = "log in as someone who may: hf auth login, or HF_TOKEN" if status in (401, 403) else None
        raise TransferError(f"{name}: status {status}: {first_line(exc)}", hint=hint) from exc
    except (httpx2.TransportError, ConnectionError, TimeoutError) as exc:
        raise Again(first_line(exc)) from exc
    except RuntimeError as exc:  # what the library makes of an upload that failed
        if exc.__cause__ is None:
            raise
        with _errors(name):
            raise exc.__cause__ from None
