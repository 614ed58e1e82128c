"""Which kind of place a text means: a line for each in KINDS, by the scheme of its references.

In: what a user writes after --to, or a reference to pull. Out: a Place, whose module is imported only then.
"""

from __future__ import annotations

import pkgutil
import re
from dataclasses import dataclass

from quantize.errors import UsageError
from quantize.publish.base import Found, Place, split_digest
from quantize.publish.retry import Retry
from quantize.store.artifact import Artifact

SCHEME = re.compile(r"[a-z][a-z0-9+.-]*(?=://)")


@dataclass(frozen=True)
class PlaceKind:
    """A kind of place. schemes: of its references; "" where they have none. form: as help and errors have it.

    place: module:class, a Place.
    """

    schemes: tuple[str, ...]
    form: str
    place: str

    def load(self) -> type[Place]:
        """The class. Raises MissingExtraError: what it needs is not installed."""
        found: type[Place] = pkgutil.resolve_name(self.place)
        return found


KINDS = (
    PlaceKind(("", "file"), "a folder", "quantize.publish.folder:FolderPlace"),
    PlaceKind(("oci", "oci+http"), "oci://HOST/REPOSITORY[:TAG]", "quantize.publish.registry:RegistryPlace"),
    PlaceKind(("hf",), "hf://ORG[/NAME]", "quantize.publish.hub:HubPlace"),
)
OTHERS = PlaceKind((), "a URL that fsspec knows", "quantize.publish.filesystem:FilesystemPlace")


def forms() -> str:
    """What a target can be, for people."""
    return f"{', '.join(kind.form for kind in KINDS)}, or {OTHERS.form}"


def place_for(target: str, artifact: Artifact, retry: Retry) -> Place:
    """Where an artifact is published in a target. Raises UsageError, MissingExtraError."""
    if split_digest(target)[1] is not None:
        raise UsageError(f"{target}: a target has no digest", hint="it is computed from what is published")
    return _kind(target).to_publish(target, artifact.manifest.name, artifact.manifest.variant, retry)


def find_place(text: str, retry: Retry) -> Found:
    """What a reference means. Raises UsageError, MissingExtraError."""
    return _kind(text).to_fetch(text, retry)


def _kind(text: str) -> type[Place]:
    match = SCHEME.match(text)
    scheme = match[0] if match else ""
    return next((kind for kind in KINDS if scheme in kind.schemes), OTHERS).load()
