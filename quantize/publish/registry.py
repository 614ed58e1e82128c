"""An OCI registry as a target: oci://HOST/REPOSITORY[:TAG], by the OCI distribution specification v1.1.

In: blobs and a manifest. Out: the same, with every request tried again while that may help. A large blob goes in
pieces, and on at the piece that failed; the manifest goes last, by its digest, and the tags after it.

Why not the `oras` package: its 0.2 sends a file as one body from memory, starts over when that breaks, does not try
again on a status such as 503, fetches without ranges, and compares no hashes. The tests have it read what is here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from quantize.errors import TransferError, UsageError, VerifyError, first_line
from quantize.publish.base import Count, Found, size_of, write_stream
from quantize.publish.claims import Turn, may_move
from quantize.publish.credentials import DOCKER_HUB, credential_for
from quantize.publish.pack import MANIFEST_TYPE, MAX_MANIFEST_BYTES, Blob, Pack
from quantize.publish.retry import Again, Retry, persist
from quantize.publish.web import HttpRequest, Web, is_loopback
from quantize.system.digest import SHORT_DIGITS, WHOLE, digest_of, short
from quantize.system.untrusted import parse_json

CHUNK_BYTES = 16 << 20
READ_BYTES = 1 << 20
REFERENCE = re.compile(
    r"oci(?P<plain>\+http)?://(?P<host>[A-Za-z0-9.-]+(?::\d+)?|\[[0-9a-f:]+\](?::\d+)?)"
    r"(?P<repository>(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?" + rf"(?:@(?P<digest>{WHOLE}))?/?"
)
ACCEPTED = ", ".join(
    (
        MANIFEST_TYPE,
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    )
)
ANEW = "publish the artifact again"
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
SHORT = rf"[0-9a-f]{{{SHORT_DIGITS}}}"
ONE_PUBLICATION = re.compile(rf"-{SHORT}(-after-{SHORT})?$")  # tags that never move
PAGE, MAX_PAGES = 1000, 100  # of a list of tags
NO_PIECES = {400, 404, 405, 411, 413, 415, 416, 501}  # what registries say that take a blob only as one body


@dataclass(frozen=True)
class RegistryReference:
    """A registry's repository, and a tag or digest in it."""

    host: str
    repository: str
    tag: str | None
    digest: str | None
    plain: bool

    @property
    def url(self) -> str:
        """The registry's address. Plain HTTP is for this machine, or where oci+http:// asks for it."""
        name = self.host.rpartition(":")[0] if re.search(r":\d+$", self.host) else self.host
        host = DOCKER_HUB[0] if self.host in DOCKER_HUB else self.host
        return f"{'http' if self.plain or is_loopback(name) else 'https'}://{host}"

    def text(self, tag: str | None = None, digest: str | None = None) -> str:
        """As a user writes it."""
        scheme = "oci+http" if self.plain else "oci"
        end = (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")
        return f"{scheme}://{self.host}/{self.repository}{end}"


def parse(text: str) -> RegistryReference:
    """Raises UsageError: not oci://HOST/REPOSITORY with a tag or digest."""
    match = REFERENCE.fullmatch(text)
    if match is None:
        hint = "such as oci://ghcr.io/me/models, or oci://ghcr.io/me/models/name:tag; repositories are lower case"
        raise UsageError(f"{text!r} is not a place in a registry", hint=hint)
    return RegistryReference(
        match["host"], match["repository"].strip("/"), match["tag"], match["digest"], bool(match["plain"])
    )


class RegistryPlace:
    """A repository and one tag of it. Blobs are shared by all that is in the repository."""

    by_content = True

    def __init__(self, reference: RegistryReference, retry: Retry, *, write: bool) -> None:
        if not reference.repository:
            raise UsageError(f"oci://{reference.host}: no repository", hint="such as oci://HOST/team/models")
        self._reference, self._retry = reference, retry
        scope = f"repository:{reference.repository}:{'pull,push' if write else 'pull'}"
        self._web = Web(reference.url, scope, lambda: credential_for(reference.host), retry)
        self._base = f"{reference.url}/v2/{reference.repository}"
        self._write = write
        self._seen: set[str] | None = None  # tags that were there when this first asked

    @classmethod
    def to_publish(cls, target: str, name: str, variant: str, retry: Retry) -> RegistryPlace:
        """See Place."""
        place = parse(target)
        if place.tag is None:
            place = parse(f"{target.rstrip('/')}/{name.lower()}:{variant}")
        return cls(place, retry, write=True)

    @classmethod
    def to_fetch(cls, reference: str, retry: Retry) -> Found:
        """See Place."""
        found = parse(reference)
        place = cls(found, retry, write=False)
        return Found(place, found.digest, found.tag is not None and found.digest is not None)

    def close(self) -> None:
        """Close its connections."""
        self._web.close()

    @property
    def tag(self) -> str:
        """The tag that stands for the newest publication."""
        return self._reference.tag or "latest"

    @property
    def name(self) -> str:
        """The tag as a reference."""
        return self._reference.text(self.tag)

    @property
    def title(self) -> str:
        """The repository, without those above it."""
        return self._reference.repository.rpartition("/")[2]

    def pinned(self, digest: str) -> str:
        """A reference that never means anything else."""
        return self._reference.text(digest=digest)

    def tagged(self) -> str | None:
        """The digest that the tag means now; None if there is no such tag."""
        if self._write and self._seen is None:
            self._seen = self._tags()
        data = self._manifest(self.tag)
        return None if data is None else digest_of(data)

    def manifest(self, digest: str) -> bytes:
        """A manifest's bytes. Raises VerifyError: not there."""
        data = self._manifest(digest)
        if data is None:
            raise VerifyError(f"{self.pinned(digest)}: there is no such manifest", hint="was it published there?")
        return data

    def _manifest(self, reference: str) -> bytes | None:
        answer = self._web.call(
            HttpRequest("GET", f"{self._base}/manifests/{reference}", {200, 404}, {"Accept": ACCEPTED})
        )
        return answer.data if answer.status == 200 else None

    def has(self, blob: Blob, pack: Pack) -> bool:
        """Whether the blob is there with its size."""
        answer = self._web.call(HttpRequest("HEAD", self._blob_url(blob), {200, 404}))
        return answer.status == 200 and answer.headers.get("content-length", "") in ("", str(blob.size_bytes))

    def _blob_url(self, blob: Blob) -> str:
        return f"{self._base}/blobs/{blob.digest}"

    def send(self, blob: Blob, source: Path, pack: Pack, count: Count) -> None:
        """Upload one blob; goes on where it broke off."""
        upload = _Upload(self._web, f"{self._base}/blobs/uploads/", blob, source, count)

        def step() -> None:
            if upload.failed and self.has(blob, pack):  # it was taken, and only the answer was lost
                upload.moved_to(blob.size_bytes)
            else:
                upload.go_on()

        persist(step, self._retry, f"{self._web.host}: {blob.path}")

    def seal(self, pack: Pack, *, move_from: str | None) -> str:
        """Put the manifest, then its tags: one that never moves, so that no registry collects it, and `tag`."""
        if len(pack.document) > MAX_MANIFEST_BYTES:
            raise TransferError(f"{self.name}: too many files for one manifest")
        if self._manifest(pack.digest) != pack.document:
            self._put(pack, pack.digest)
        lasting = f"{self.tag[:110]}-{pack.short_digest}"
        if self._manifest(lasting) != pack.document:
            self._put(pack, lasting)
        if move_from != pack.digest and self._may_move(pack, lasting, move_from):
            self._put(pack, self.tag)
        return self.pinned(pack.digest)

    def _may_move(self, pack: Pack, lasting: str, move_from: str | None) -> bool:
        """Claim the tag. The first time, the lasting tag is the claim; later it is one that says from what to what."""
        claim, pattern = lasting, rf"{re.escape(self.tag[:110])}-{SHORT}"
        if move_from is not None:
            tag, after = self.tag[:90], f"-after-{short(move_from)}"
            claim, pattern = f"{tag}-{pack.short_digest}{after}", rf"{re.escape(tag)}-{SHORT}{after}"
            self._put(pack, claim)
        turn = Turn(self.name, claim, self._seen or (), pack.digest, move_from)
        claims = partial(self._tags_like, re.compile(pattern))
        return may_move(turn, claims, self.tagged, self._retry.pause)

    def _tags_like(self, pattern: re.Pattern[str]) -> set[str]:
        return {tag for tag in self._tags() if pattern.fullmatch(tag)}

    def _tags(self) -> set[str]:
        """Every tag of the repository; none where the registry lists none."""
        found: set[str] = set()
        url = f"{self._base}/tags/list?n={PAGE}"
        for _ in range(MAX_PAGES):
            answer = self._web.call(HttpRequest("GET", url, {200, 404, 405, 501}))
            if answer.status != 200:
                break
            found |= tags_of(answer.data)
            match = re.search(r'<([^>]+)>\s*;\s*rel="?next', answer.headers.get("link", ""))
            if match is None:
                break
            url = self._web.location(answer.url, {"location": match[1]})
        return found

    def takes(self, blob: Blob, pack: Pack) -> int:
        """All of it."""
        return blob.size_bytes

    def free_bytes(self) -> int | None:
        """No registry says."""
        return None

    def known(self) -> list[str]:
        """Its tags, without those that stand for one publication."""
        return [self._reference.text(tag) for tag in sorted(self._tags()) if not ONE_PUBLICATION.search(tag)]

    def _put(self, pack: Pack, reference: str) -> None:
        url, headers = f"{self._base}/manifests/{reference}", {"Content-Type": MANIFEST_TYPE}
        self._web.call(HttpRequest("PUT", url, {200, 201}, headers, pack.document))

    def fetch(self, blob: Blob, target: Path, pack: Pack, count: Count) -> None:
        """Download one blob to a file; what is in it already is not fetched again."""
        furthest = size_of(target)

        def step() -> None:
            nonlocal furthest
            try:
                self._fetch_on(blob, target, count)
            except Again as again:
                again.moved = size_of(target) > furthest
                furthest = max(furthest, size_of(target))
                raise

        persist(step, self._retry, f"{self._web.host}: {blob.path}")

    def _fetch_on(self, blob: Blob, target: Path, count: Count) -> None:
        start = size_of(target)
        if start >= blob.size_bytes > 0:
            return
        headers = {"Range": f"bytes={start}-"} if start else {}
        with self._web.stream(HttpRequest("GET", self._blob_url(blob), {200, 206, 404, 416}, headers)) as response:
            if response.status_code == 404:
                raise VerifyError(f"{blob.path}: the registry has lost it", hint=ANEW)
            if response.status_code == 416:
                raise VerifyError(f"{blob.path} is cut off: the registry has no more than {start:,} bytes", hint=ANEW)
            goes_on = response.headers.get("content-range", "").startswith(f"bytes {start}-")
            if start and not goes_on:
                count(-start)
            write_stream(target, response.iter_raw(), blob, count, append=goes_on)
        if size_of(target) < blob.size_bytes:
            told = f"{size_of(target):,} of {blob.size_bytes:,} bytes"
            if "content-length" in response.headers:  # it came as long as it is
                raise VerifyError(f"{blob.path} is cut off: the registry has {told}", hint=ANEW)
            raise Again(f"the connection ended after {told}")


def tags_of(data: bytes) -> set[str]:
    """The tags that a registry's list has. Raises TransferError: it is none."""
    try:
        found = parse_json(data)["tags"] or []
        return {tag for tag in found if TAG.fullmatch(tag)}
    except (ValueError, KeyError, TypeError) as exc:
        raise TransferError(f"the registry's list of tags is none ({first_line(exc)})") from exc


class _Upload:
    """One blob on its way up, piece by piece. `failed`: a try has failed already."""

    def __init__(self, web: Web, start_url: str, blob: Blob, source: Path, count: Count) -> None:
        self._web, self._start_url, self._blob, self._source, self._count = web, start_url, blob, source, count
        self._url: str | None = None
        self._done, self._counted, self._furthest = 0, 0, 0
        self._starts, self._piece_bytes, self._in_pieces = 0, CHUNK_BYTES, blob.size_bytes > CHUNK_BYTES
        self.failed = False

    def go_on(self) -> None:
        """From where the registry says that it is, to the end. Raises Again."""
        try:
            if self._url is None or (self.failed and not self._found_again()):
                self._begin()
            while self._in_pieces and self._done < self._blob.size_bytes:
                self._send_piece()
            self._finish()
        except Again as again:
            again.moved, self.failed = self._done > self._furthest, True
            self._furthest = max(self._furthest, self._done)
            if not self._in_pieces:
                self._url = None
            raise

    def moved_to(self, done: int) -> None:
        """So many bytes are there."""
        self._done = done
        self._count(done - self._counted)
        self._counted = done

    def _begin(self) -> None:
        answer = self._web.once(HttpRequest("POST", self._start_url, {202}, {"Content-Length": "0"}))
        self._url = self._web.location(answer.url, answer.headers)
        least = answer.headers.get("oci-chunk-min-length", "")
        self._piece_bytes = max(CHUNK_BYTES << self._starts, int(least) if least.isdigit() else 0)
        self._starts += 1  # some registries forget an upload when an answer is lost: the fewer answers, the better
        self._in_pieces = self._in_pieces and self._piece_bytes < self._blob.size_bytes
        self.moved_to(0)

    def _found_again(self) -> bool:
        """Ask where the upload is; False if the registry has dropped it."""
        assert self._url is not None
        answer = self._web.once(HttpRequest("GET", self._url, {204, *NO_PIECES}))
        match = re.fullmatch(r"(?:bytes=)?0-(\d+)", answer.headers.get("range", ""))
        if answer.status != 204 or match is None:
            return False
        if "location" in answer.headers:
            self._url = self._web.location(answer.url, answer.headers)
        end = int(match[1])
        self.moved_to(end + 1 if end else 0)  # an empty upload is 0-0 too
        return self._done <= self._blob.size_bytes

    def _send_piece(self) -> None:
        assert self._url is not None
        data = self._read(self._done, self._piece_bytes)
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Range": f"{self._done}-{self._done + len(data) - 1}",
            "Content-Length": str(len(data)),
        }
        answer = self._web.once(HttpRequest("PATCH", self._url, {202, *NO_PIECES}, headers, data))
        if answer.status == 202:
            self._url = self._web.location(answer.url, answer.headers)
            self.moved_to(self._done + len(data))
            return
        self._url, self._in_pieces = None, self._done > 0  # an upload that was lost, or a registry without pieces
        raise Again(f"status {answer.status} for a piece of a blob")

    def _finish(self) -> None:
        assert self._url is not None
        url = self._url + ("&" if "?" in self._url else "?") + f"digest={self._blob.digest}"
        size = self._blob.size_bytes - self._done
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        body = self._rest(self._done) if size else b""
        answer = self._web.once(HttpRequest("PUT", url, {201, 204, *NO_PIECES}, headers, body))
        if answer.status in (201, 204):
            self.moved_to(self._blob.size_bytes)
            return
        self._url = None
        raise Again(f"status {answer.status} at the end of a blob: not the bytes with that digest, or a lost upload")

    def _rest(self, start: int) -> Callable[[], Iterator[bytes]]:
        def read() -> Iterator[bytes]:
            at = start
            while data := self._read(at, READ_BYTES):
                yield data
                at += len(data)

        return read

    def _read(self, start: int, size: int) -> bytes:
        with self._source.open("rb") as file:
            file.seek(start)
            return file.read(size)
