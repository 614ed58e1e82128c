"""What a word on the command line means: an artifact, a GGUF file, a folder, or an upstream's address.

In: `[NAME=]REF` and a store. Out: a LocalTarget or an Upstream. Headers are read, weights are not. Raises UsageError,
RefusedError for pickled weights.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from quantize.errors import RefusedError, UsageError
from quantize.estimate.vram import repacked_bytes
from quantize.files.gguf import read_gguf
from quantize.model.checkpoint import read_json
from quantize.model.shape import ModelShape, gguf_shape
from quantize.store.artifact import Artifact, open_artifact
from quantize.store.manifest import FILE_NAME
from quantize.store.store import Store

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
    def kind(self) -> str:
        """The engine that it runs in."""
        return "llama.cpp" if self.format == "gguf" else "transformers"

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.path.parent if self.format == "gguf" else self.path


def resolve(text: str, store: Store) -> LocalTarget | UpstreamTarget:
    """What `text` means."""
    match = NAMED.fullmatch(text)
    is_url = re.match(r"https?://", text) is not None
    name, ref = (match[1], match[2]) if match and not is_url and not Path(text).exists() else (None, text)
    if re.match(r"https?://", ref):
        return _upstream(name, ref)
    path = Path(ref)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(f"{path}: not a .gguf file", hint="give an artifact, a .gguf file or a model's folder")
        return _gguf(name or path.stem, path)
    if path.is_dir() and not (path / FILE_NAME).is_file() and (path / "config.json").is_file():
        return _folder(name or path.resolve().name, path)
    artifact = open_artifact(path) if (path / FILE_NAME).is_file() else store.find(ref)
    return _artifact(name, artifact)


def _upstream(name: str | None, ref: str) -> UpstreamTarget:
    url, _, model = ref.partition("#")
    key_name = f"{KEY_VARIABLE}_{re.sub(r'[^A-Z0-9]', '_', (name or '').upper())}"
    key = os.environ.get(key_name) or os.environ.get(KEY_VARIABLE) or None
    return UpstreamTarget(name or model or "upstream", url, model or None, key)


def _artifact(name: str | None, artifact: Artifact) -> LocalTarget:
    manifest = artifact.manifest
    name = name or f"{manifest.name}/{manifest.variant}"
    if manifest.format == "gguf":
        files = [entry.path for entry in manifest.files if entry.path.endswith(".gguf")]
        main = [file for file in files if not file.endswith(".imatrix.gguf")]
        if not main:
            raise RefusedError(f"{artifact.ref}: no GGUF file in it", hint="run quantize verify")
        target = _gguf(name, artifact.folder / main[0])
    else:
        target = _folder(name, artifact.folder, manifest.format)
    return LocalTarget(
        name, manifest.format, target.path, target.shape, target.weights_bytes, target.repacked_bytes, artifact
    )


def _gguf(name: str, path: Path) -> LocalTarget:
    file = read_gguf(path)
    tensors = [(item.name, item.type, item.size_bytes) for item in file.tensors.values()]
    tied = all(item != "output.weight" for item in file.tensors)
    size = sum(item[2] for item in tensors)
    return LocalTarget(name, "gguf", path, gguf_shape(file), size, repacked_bytes(tensors, tied=tied))


def _folder(name: str, folder: Path, format: str | None = None) -> LocalTarget:
    config = read_json(folder / "config.json")
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())
    if not weights:
        hint = "weights must be *.safetensors: pickled ones can run code, and are never loaded"
        raise RefusedError(f"{folder}: no safetensors files in it", hint=hint)
    return LocalTarget(name, format or _format(config, folder), folder, ModelShape.from_config(config), weights)


def _format(config: dict[str, Any], folder: Path) -> str:
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    known = {None: "safetensors", "awq": "awq", "gptq": "gptq", "bitsandbytes": "bitsandbytes"}
    if not (method is None or isinstance(method, str)) or method not in known:
        hint = f"known are: {', '.join(item for item in known.values())}"
        raise RefusedError(f"{folder}: quantized by {str(method)[:40]!r}, which is not served here", hint=hint)
    return known[method]
