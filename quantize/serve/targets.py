"""What a word on the command line means: an artifact, a GGUF file, a folder, or an upstream's address.

In: `[NAME=]REF` and a store. Out: a LocalTarget or an Upstream. Headers are read, weights are not. Raises UsageError,
RefusedError for pickled weights.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from quantize.errors import RefusedError, UsageError
from quantize.formats import find_format, format_of, formats, runtime_kind
from quantize.formats.folder import quantization_method
from quantize.formats.format import Format
from quantize.model.shape import ModelShape
from quantize.runtimes.base import RuntimeKind
from quantize.store.artifact import Artifact
from quantize.store.store import Store
from quantize.targets import ADDRESS, AddressTarget, ArtifactTarget, FileTarget, FolderTarget, find_target

NAMED = re.compile(r"([A-Za-z0-9][\w./:@-]{0,99})=(.+)", re.DOTALL)
KEY_VARIABLE = "QUANTIZE_UPSTREAM_KEY"


@dataclass(frozen=True)
class UpstreamTarget:
    """An OpenAI-compatible server: base URL, and the model's name there if it was given after a #."""

    name: str
    url: str
    model: str | None = None
    key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            hint = "an address such as http://127.0.0.1:8080/v1; its key goes into QUANTIZE_UPSTREAM_KEY"
            raise UsageError(f"upstream {self.name}: not the address of a server", hint=hint)

    @property
    def host(self) -> str:
        """host:port"""
        return urlsplit(self.url).netloc


@dataclass(frozen=True)
class LocalTarget:
    """Something on this machine to load. path: the GGUF file or the folder. weights_bytes: as they lie on disk."""

    name: str
    format: str
    path: Path
    shape: ModelShape
    weights_bytes: int
    repacked_bytes: int = 0
    artifact: Artifact | None = None

    @property
    def kind(self) -> RuntimeKind:
        """What it runs in. Raises UsageError: nothing here runs it."""
        return runtime_kind(self.format)

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.path.parent if self.path.is_file() else self.path


def resolve(text: str, store: Store) -> LocalTarget | UpstreamTarget:
    """What `text` means."""
    named = NAMED.fullmatch(text)
    is_url = ADDRESS.match(text)
    name, ref = (named[1], named[2]) if named and not is_url and not os.path.exists(text) else (None, text)
    match find_target(ref, store, (ArtifactTarget, FileTarget, FolderTarget, AddressTarget)):
        case AddressTarget(address):
            return _upstream(name, address)
        case FileTarget(path, kind):
            return _local(name or path.stem, kind, path)
        case FolderTarget(path):
            kind = _format_of_folder(path)
            return _local(name or path.resolve().name, kind, kind.model_path(path))
        case ArtifactTarget(artifact):
            return _artifact(name, artifact)


def _upstream(name: str | None, ref: str) -> UpstreamTarget:
    url, _, model = ref.partition("#")
    key_name = f"{KEY_VARIABLE}_{re.sub(r'[^A-Z0-9]', '_', (name or '').upper())}"
    key = os.environ.get(key_name) or os.environ.get(KEY_VARIABLE) or None
    return UpstreamTarget(name or model or "upstream", url, model or None, key)


def _artifact(name: str | None, artifact: Artifact) -> LocalTarget:
    manifest = artifact.manifest
    kind = find_format(manifest.format)
    path = kind.model_path(artifact.folder)
    return replace(_local(name or f"{manifest.name}/{manifest.variant}", kind, path), artifact=artifact)


def _local(name: str, kind: Format, path: Path) -> LocalTarget:
    found = kind.layout.measure(path)
    return LocalTarget(name, kind.name, path, found.shape, found.weights_bytes, found.repacked_bytes)


def _format_of_folder(folder: Path) -> Format:
    kind = format_of(folder)
    if kind is None:
        hint = f"known are: {', '.join(formats())}"
        method = quantization_method(folder)
        raise RefusedError(f"{folder}: quantized by {method!r}, which is not served here", hint=hint)
    return kind
