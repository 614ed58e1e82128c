"""The layout that most formats share: a folder as transformers writes it, with config.json and safetensors files.

In: a folder. Out: what it is, from headers alone. Which quantization its config names is for each format to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantize.errors import RefusedError
from quantize.files.compare import WeightFile, safetensors_file
from quantize.formats.format import OnDisk
from quantize.model.checkpoint import tensor_table
from quantize.model.folder_files import read_chat_template, read_json
from quantize.model.shape import ModelShape

MLX = "mlx"


@dataclass(frozen=True)
class FolderLayout:
    """See Layout. method: `quant_method` in the folder's quantization_config; None for unquantized weights."""

    method: str | None
    container: str = "safetensors"
    library: str | None = "transformers"

    def recognizes(self, path: Path) -> bool:
        """By config.json."""
        return (path / "config.json").is_file() and quantization_method(path) == self.method

    def main_name(self, names: Iterable[str]) -> str | None:
        """None: the folder is opened."""
        return None

    def main_file(self, folder: Path) -> Path | None:
        """None: the folder is opened."""
        return None

    def weight_names(self, names: Iterable[str]) -> tuple[str, ...]:
        """See Layout; by the suffix."""
        return tuple(name for name in names if name.endswith(".safetensors"))

    def read(self, path: Path) -> WeightFile:
        """See Layout."""
        return safetensors_file(path)

    def measure(self, path: Path) -> OnDisk:
        """See Layout."""
        if not any(file.is_file() for file in path.glob("*.safetensors")):
            hint = "weights must be *.safetensors: pickled ones can run code, and are never loaded"
            raise RefusedError(f"{path}: no safetensors files in it", hint=hint)
        weights = sum(item.size_bytes for item in tensor_table(path).values())
        return OnDisk(ModelShape.from_config(read_json(path / "config.json")), weights)

    def chat_template(self, path: Path) -> str | None:
        """See Layout."""
        return read_chat_template(path)


def quantization_method(folder: Path) -> str | None:
    """What config.json says that the weights were quantized by; None: by nothing. Raises CheckpointError."""
    config = read_json(folder / "config.json")
    settings = config.get("quantization_config")
    if isinstance(config.get("quantization"), dict) and not (isinstance(settings, dict) and "quant_method" in settings):
        return MLX  # which has a key of its own, and a copy of it in the usual place that names no method
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    return None if method is None else str(method)[:40]


def not_packed(folder: Path, names: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """Of the linears, those beside which no tensor with one of the suffixes lies."""
    have = tensor_table(folder)
    return [name for name in names if not any(name.removesuffix("weight") + suffix in have for suffix in suffixes)]
