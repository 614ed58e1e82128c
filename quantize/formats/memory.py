"""An artifact in the store -> what it takes of a GPU by today's formula, from its headers and its manifest's numbers.

Nothing of it is kept: a better formula changes what is said of an artifact, and not the artifact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantize.errors import QuantizeError
from quantize.estimate.vram import MemoryTable, memory_table
from quantize.formats import find_format

if TYPE_CHECKING:
    from quantize.store.artifact import Artifact


def memory_of(artifact: Artifact) -> MemoryTable | None:
    """In the runtime that the format is estimated for; None: its format is not installed, or its headers are damaged
    or not there.
    """
    try:
        kind = find_format(artifact.manifest.format)
        shape = kind.layout.measure(kind.model_path(artifact.folder)).shape
    except (QuantizeError, OSError):
        return None
    return memory_table(shape, artifact.manifest.weights_bytes, profile=kind.vram)
