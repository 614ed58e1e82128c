"""Reopen an artifact and say whether it is what its manifest says.

In: an artifact. Out: nothing, or VerifyError. Hashes and sizes here; what only the format knows, through its builder.
"""

from __future__ import annotations

from pathlib import Path

from quantize.errors import VerifyError
from quantize.events import Reporter, progress
from quantize.store.artifact import Artifact
from quantize.store.manifest import PAPERS, FileEntry
from quantize.system.cache import hash_file


def check_files(artifact: Artifact, reporter: Reporter) -> None:
    """Every file is there, with its size and hash, and none that the manifest does not name. Raises VerifyError."""
    total, done = artifact.manifest.size_bytes, 0

    def count(read: int) -> None:
        nonlocal done
        done += read
        progress(reporter, artifact.manifest.variant, "checking hashes", done, total)

    for entry in artifact.manifest.files:
        path = inside(artifact.folder, entry)
        if not path.is_file():
            raise VerifyError(f"{artifact.ref}: {entry.path} is missing", hint="build or pull it again")
        size = path.stat().st_size
        if size != entry.size_bytes:
            raise VerifyError(
                f"{artifact.ref}: {entry.path} has {size:,} bytes, the manifest says {entry.size_bytes:,}"
            )
        if hash_file(path, count) != entry.sha256:
            raise VerifyError(f"{artifact.ref}: {entry.path} was altered: its sha256 is not the manifest's")
    _check_no_others(artifact)


def inside(folder: Path, entry: FileEntry) -> Path:
    """The path of an entry. Raises VerifyError if it leaves the artifact's folder."""
    path = folder / entry.path
    if Path(entry.path).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        raise VerifyError(f"{folder}: the manifest names {entry.path!r}, outside the artifact")
    return path


def _check_no_others(artifact: Artifact) -> None:
    known = {entry.path for entry in artifact.manifest.files} | set(PAPERS)
    for path in sorted(artifact.folder.rglob("*")):
        name = path.relative_to(artifact.folder).as_posix()
        if path.is_file() and name not in known and not path.name.startswith("."):
            raise VerifyError(f"{artifact.ref}: {name} is not in the manifest", hint="move it out of the artifact")
