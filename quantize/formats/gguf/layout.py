"""A GGUF model on disk: one file in a folder, or its parts, beside the importance matrix that it may be made with, and
the file with the towers of a model that reads more than text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from quantize.errors import VerifyError
from quantize.estimate.vram import repacked_bytes
from quantize.files.compare import WeightFile, gguf_file
from quantize.files.gguf import TOWERS_START, read_gguf
from quantize.files.gguf_split import read_model
from quantize.formats.format import OnDisk
from quantize.model.shape import gguf_shape

SUFFIX = ".gguf"
IMATRIX_SUFFIX = ".imatrix.gguf"


def is_mmproj(name: str) -> bool:
    """Whether a file, by its name, is one with towers."""
    return PurePosixPath(name).name.startswith(TOWERS_START) and name.endswith(SUFFIX)


@dataclass(frozen=True)
class GgufLayout:
    """See Layout."""

    container: str = "gguf"
    library: str | None = None

    def recognizes(self, path: Path) -> bool:
        """By the file's suffix."""
        return path.is_file() and path.suffix == SUFFIX

    def main_name(self, names: Iterable[str]) -> str | None:
        """See Layout; the first by name, which is the first part of a model in several."""
        return min(self.weight_names(names), default=None)

    def weight_names(self, names: Iterable[str]) -> tuple[str, ...]:
        """See Layout; an importance matrix is none, and towers are not what a variant is about."""
        named = (name for name in names if name.endswith(SUFFIX) and not name.endswith(IMATRIX_SUFFIX))
        return tuple(name for name in named if not is_mmproj(name))

    def read(self, path: Path) -> WeightFile:
        """See Layout."""
        return gguf_file(path)

    def main_file(self, folder: Path) -> Path:
        """See Layout."""
        name = self.main_name(path.name for path in folder.iterdir()) if folder.is_dir() else None
        if name is None:
            raise VerifyError(f"{folder}: no .gguf file", hint="run quantize verify")
        return folder / name

    def measure(self, path: Path) -> OnDisk:
        """See Layout."""
        file = read_model(path)
        rows = [(item.name, item.type, item.size_bytes) for item in file.tensors.values()]
        again = repacked_bytes(rows, tied="output.weight" not in file.tensors)
        return OnDisk(gguf_shape(file), sum(size for _, _, size in rows), again)

    def chat_template(self, path: Path) -> str | None:
        """See Layout."""
        found = read_gguf(path).fields.get("tokenizer.chat_template")
        return found if isinstance(found, str) else None
