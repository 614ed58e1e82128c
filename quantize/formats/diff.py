"""Two artifacts -> what differs between them, from their manifests and the headers of their weight files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantize.formats import known_format
from quantize.store.artifact import Artifact

SUMMARIZED = ("files", "build_key", "kept_in_high_precision")


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same; None where one side does not have it."""

    what: str
    first: Any
    second: Any


def compare(first: Artifact, second: Artifact) -> list[Difference]:
    """Settings, source and tools; then files by bytes; then tensors by type and size. Raises CheckpointError."""
    found = _fields("", _settings(first), _settings(second))
    found += _fields("file ", _files(first), _files(second))
    found += _fields("tensor ", tensor_types(first), tensor_types(second))
    return found


def tensor_types(artifact: Artifact) -> dict[str, str]:
    """Each tensor's type and bytes, from headers only."""
    layout = known_format(artifact.manifest.format).layout
    names = layout.weight_names(entry.path for entry in artifact.manifest.files)
    files = [layout.read(artifact.folder / name) for name in names]
    return {name: f"{item.type} ({item.size_bytes:,} B)" for file in files for name, item in file.tensors.items()}


def _settings(artifact: Artifact) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in artifact.manifest.facts().items():
        if key in SUMMARIZED:
            continue
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": item for inner, item in value.items()})
        else:
            flat[key] = value
    return flat


def _files(artifact: Artifact) -> dict[str, str]:
    return {item.path: f"{item.size_bytes:,} B {item.sha256[:12]}" for item in artifact.manifest.files}


def _fields(prefix: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    return [
        Difference(prefix + key, first.get(key), second.get(key))
        for key in sorted({*first, *second})
        if first.get(key) != second.get(key)
    ]
