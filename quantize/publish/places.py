"""Which target a text means: oci://, hf://, a folder, or a URL for fsspec.

In: what a user writes after --to, or a reference to pull. Out: a Place, whose module is imported only then.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from quantize.errors import UsageError, VerifyError
from quantize.publish.base import Place
from quantize.publish.retry import Retry
from quantize.store.artifact import Artifact
from quantize.system.digest import WHOLE, digest_of, from_digits, is_short, short

SCHEME = re.compile(r"[a-z][a-z0-9+.-]*(?=://)")
DIGEST_END = re.compile(rf"@({WHOLE})$")


def place_for(target: str, artifact: Artifact, retry: Retry) -> Place:
    """Where an artifact is published in a target. Raises UsageError."""
    name, variant = artifact.manifest.name, artifact.manifest.variant
    if DIGEST_END.search(target):
        raise UsageError(f"{target}: a target has no digest", hint="it is computed from what is published")
    scheme = _scheme(target)
    if scheme in ("oci", "oci+http"):
        from quantize.publish import registry

        place = registry.parse(target)
        if place.tag is None:
            place = registry.parse(f"{target.rstrip('/')}/{name.lower()}:{variant}")
        return registry.RegistryPlace(place, retry, write=True)
    if scheme == "hf":
        from quantize.publish import hub

        repository = hub.parse(target)
        if "/" not in repository.repository:
            repository = hub.parse(f"hf://{repository.repository}/{name}-{variant}")
        return hub.HubPlace(repository, retry, write=True)
    return _tree(f"{target.rstrip('/')}/{name}/{variant}", retry)


@dataclass(frozen=True)
class Found:
    """What a reference means. digest: the one in it; and_name: it gives a tag beside the digest, which must agree."""

    place: Place
    digest: str | None
    and_name: bool = False


def find_place(text: str, retry: Retry) -> Found:
    """What a reference means. Raises UsageError."""
    scheme = _scheme(text)
    if scheme in ("oci", "oci+http"):
        from quantize.publish import registry

        found = registry.parse(text)
        place = registry.RegistryPlace(found, retry, write=False)
        return Found(place, found.digest, found.tag is not None and found.digest is not None)
    if scheme == "hf":
        from quantize.publish import hub

        repository = hub.parse(text)
        return Found(hub.HubPlace(repository, retry, write=False), repository.digest)
    if (one := _one_publication(text, retry)) is not None:
        return one
    match = DIGEST_END.search(text)
    return Found(_tree(text[: match.start()] if match else text, retry), match[1] if match else None)


def _one_publication(text: str, retry: Retry) -> Found | None:
    """What a reference means that names the folder of one publication, as a share shows it."""
    above, _, folder = text.rstrip("/").rpartition("/")
    if not above or not is_short(folder):
        return None
    place = _tree(above, retry)
    try:
        digest = digest_of(place.manifest(from_digits(folder)))
    except VerifyError:  # a variant that is called so
        return None
    if short(digest) != folder:
        hint = "publish the artifact again, or name another publication"
        raise VerifyError(f"{text}: its manifest is not the one that the folder is named by", hint=hint)
    return Found(place, digest)


def _tree(text: str, retry: Retry) -> Place:
    scheme = _scheme(text)
    if scheme in ("", "file"):
        from quantize.publish.folder import FolderPlace

        return FolderPlace(Path(text.removeprefix("file://")).expanduser())
    from quantize.publish.filesystem import FilesystemPlace

    return FilesystemPlace(text, retry)


def _scheme(text: str) -> str:
    match = SCHEME.match(text)
    return match[0] if match else ""
