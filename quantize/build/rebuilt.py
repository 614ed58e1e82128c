"""What differs between an artifact and the same artifact built again.

In: both, and versions and devices here. Out: the differences as data, in words where no number says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantize.files.compare import TensorDifference, compare_metadata, compare_weights
from quantize.formats import find_format
from quantize.store.artifact import Artifact
from quantize.store.manifest import FileEntry, Manifest

DECIDED_LATER = ("files", "accepted_risk", "device")  # fields of a manifest that are not compared by themselves
OF_VERSIONS = ("tools", "build_key")  # those that differ wherever versions do
TEXT_BYTES = 32 << 20  # a file up to this is looked into for the first byte that differs


@dataclass(frozen=True)
class ToolDifference:
    """A version that is not the manifest's; here is None where it is not installed."""

    tool: str
    manifest: str | None
    here: str | None


@dataclass(frozen=True)
class DeviceDifference:
    """The kind of device that the manifest names, and another one that is here: the same work may give other bits."""

    manifest: str
    here: str

    def __str__(self) -> str:
        return f"made on another kind of processor: {self.manifest} there, {self.here} here"


@dataclass(frozen=True)
class FileDifference:
    """A file that is not the same: in words, and by tensor where it holds any."""

    path: str
    what: str
    tensors: tuple[TensorDifference, ...] = ()


def tool_differences(wanted: Mapping[str, str], here: Mapping[str, str]) -> tuple[ToolDifference, ...]:
    """Versions that differ, by name."""
    return tuple(
        ToolDifference(name, wanted.get(name), here.get(name))
        for name in sorted({*wanted, *here})
        if wanted.get(name) != here.get(name)
    )


def device_difference(manifest: Manifest, here: str | None) -> DeviceDifference | None:
    """The kind of device that is here, if it is another one. None too where the bits depend on no device, or the
    manifest is older than its record.
    """
    if manifest.device is None or here is None or here == manifest.device:
        return None
    return DeviceDifference(manifest.device, here)


def manifest_differences(wanted: Manifest, found: Manifest, *, other_versions: bool) -> tuple[str, ...]:
    """Fields that differ without a reason. other_versions: those that differ wherever versions do have one."""
    one, two = wanted.facts(), found.facts()
    skipped = {*DECIDED_LATER, *(OF_VERSIONS if other_versions else ())}
    return tuple(key for key in sorted({*one, *two} - skipped) if one.get(key) != two.get(key))


def file_differences(artifact: Artifact, rebuilt: Artifact) -> tuple[FileDifference, ...]:
    """Files that differ, by path, each looked into."""
    wanted = {entry.path: entry for entry in artifact.manifest.files}
    found = {entry.path: entry for entry in rebuilt.manifest.files}
    differences = []
    for path in sorted({*wanted, *found}):
        if path not in found:
            differences.append(FileDifference(path, "is missing in the rebuilt artifact"))
        elif path not in wanted:
            differences.append(FileDifference(path, "is new in the rebuilt artifact"))
        elif wanted[path].sha256 != found[path].sha256:
            differences.append(_difference(artifact, rebuilt.folder, wanted[path], found[path]))
    return tuple(differences)


def _difference(artifact: Artifact, rebuilt: Path, wanted: FileEntry, found: FileEntry) -> FileDifference:
    one, two = artifact.folder / wanted.path, rebuilt / found.path
    layout = find_format(artifact.manifest.format).layout
    sizes = f"{found.size_bytes:,} bytes, the artifact's has {wanted.size_bytes:,}"
    what = "differs" if found.size_bytes == wanted.size_bytes else f"has {sizes}"
    if not layout.weight_names([wanted.path]):
        return FileDifference(wanted.path, f"{what}{_first_byte(one, two)}")
    files = layout.read(one), layout.read(two)
    tensors, keys = compare_weights(*files), compare_metadata(*files)
    if keys:
        what += f", metadata {', '.join(keys)}"
    if not tensors and not keys:
        what += ", in its header or the order of its tensors"
    return FileDifference(wanted.path, what, tuple(tensors))


def _first_byte(one: Path, two: Path) -> str:
    if max(one.stat().st_size, two.stat().st_size) > TEXT_BYTES:
        return ""
    pairs = zip(one.read_bytes(), two.read_bytes(), strict=False)
    at = next((index for index, (left, right) in enumerate(pairs) if left != right), None)
    return "" if at is None else f" from byte {at:,}"
