"""A local folder -> Checkpoint: its config, its tensor table, lazy reads and a content hash; every check before work.

In: a folder in the Hugging Face layout with safetensors weights. Out: a Checkpoint, or CheckpointError that names
what is damaged, unsafe or missing. Fetching from a hub, a package or a GGUF file is left to source.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import CheckpointError, first_line
from quantize.files.safetensors import INDEX_NAME, MAX_TENSORS, TensorInfo, read_header
from quantize.model.config import number_or
from quantize.system.untrusted import open_regular, parse_json, read_limited

if TYPE_CHECKING:
    import torch

MAX_JSON_BYTES = 256 << 20
MAX_TEMPLATE_BYTES = 4 << 20
MAX_SHARDS = 10_000
FLOAT_DTYPES = ("F16", "BF16", "F32")
CARRIED_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")  # go with every artifact
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "vocab.txt",
)  # fmt: skip
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
CONFIG_FILES = ("config.json", "generation_config.json")
# Multiply by the exponent mask: a value is NaN or Inf where all exponent bits are set (IEEE 754; bfloat16 alike).
EXPONENT_MASKS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000)}


@dataclass(frozen=True)
class Checkpoint:
    """A full-precision model on disk. `tensors` lists every tensor by name, in the order of the shards."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    tokenizer_config: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """First entry of `architectures` in config.json."""
        return str(self.config["architectures"][0])

    @property
    def parameters(self) -> int:
        """Number of weights; a tied output head counts once."""
        return sum(tensor.elements for tensor in self.tensors.values())

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> str:
        """The dtype that most weights have: F16, BF16 or F32."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.elements
        return max(sorted(sizes), key=lambda name: sizes[name])

    @cached_property
    def chat_template(self) -> str | None:
        """The chat template; None if there is none."""
        return read_chat_template(self.folder)

    def files(self) -> list[Path]:
        """Every file that the model consists of: config, tokenizer, weights, licence, card; sorted by name."""
        found = {*_known_files(self.folder), *(tensor.path for tensor in self.tensors.values())}
        return sorted(found, key=lambda path: path.relative_to(self.folder).as_posix())

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its own dtype and shape, read when asked for. Needs torch. Raises KeyError, CheckpointError."""
        from safetensors import SafetensorError, safe_open

        info = self.tensors[name]
        try:
            with safe_open(info.path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as exc:
            raise CheckpointError(f"{info.path.name}: tensor {name!r} can't be read: {exc}") from exc


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder and check all that headers can tell.

    Raises CheckpointError: no config or architecture, pickled weights, links or index entries that leave the folder,
    missing shards, damaged tensors, weights that are quantized already, tokenizer missing or too large, files that
    can't be read.
    """
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder}: no such folder", hint="name a folder with config.json and *.safetensors")
    for path in _known_files(folder):
        if path.is_symlink():
            _check_inside(folder, path.name, "the folder")
    config = _config(folder)
    tensors = tensor_table(folder)
    _check_dtypes(tensors, config)
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    checkpoint = Checkpoint(folder, config, tensors, tokenizer_config)
    _check_tokenizer(checkpoint)
    return checkpoint


def read_chat_template(folder: Path) -> str | None:
    """The chat template of a folder, as transformers finds it; None if there is none.

    chat_template.jinja comes before tokenizer_config.json, and chat_template.json, an older place, last. Of several
    named ones, a list or an object, the one called "default" counts. Raises CheckpointError: it can't be read.
    """
    file = folder / "chat_template.jinja"
    if os.path.isfile(file):
        try:
            return read_limited(file, MAX_TEMPLATE_BYTES).decode("utf-8")
        except (OSError, ValueError) as exc:
            raise CheckpointError(f"{file.name}: can't be read ({first_line(exc)})", hint="download it again") from exc
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = _default_template(read_json(folder / name).get("chat_template"))
        if template is not None:
            return template
    return None


def _default_template(template: object) -> str | None:
    if isinstance(template, list):
        template = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def check_finite(checkpoint: Checkpoint) -> Iterator[tuple[int, int]]:
    """Read all weights once and yield (bytes done, bytes in all). Raises CheckpointError at the first NaN or Inf."""
    total, done, chunk_bytes = checkpoint.weights_bytes, 0, 4 << 20
    for tensor in checkpoint.tensors.values():
        for raw in _chunks(tensor, chunk_bytes):
            if _has_nan_or_inf(raw, tensor.dtype):
                raise CheckpointError(
                    f"tensor {tensor.name!r} in {tensor.path.name} has NaN or Inf weights",
                    hint="the training run or the download went wrong: take an earlier or a fresh copy",
                )
            done += len(raw)
        yield done, total


def _chunks(tensor: TensorInfo, chunk_bytes: int) -> Iterator[bytes]:
    left = tensor.size_bytes
    try:
        with open_regular(tensor.path) as file:
            file.seek(tensor.offset)
            while left:
                raw = file.read(min(left, chunk_bytes))
                if len(raw) < min(left, chunk_bytes):
                    raise CheckpointError(f"{tensor.path.name}: truncated in tensor {tensor.name!r}")
                left -= len(raw)
                yield raw
    except OSError as exc:
        raise CheckpointError(f"{tensor.path.name}: can't be read: {exc.strerror}") from exc


def _has_nan_or_inf(raw: bytes, dtype: str) -> bool:
    import numpy as np

    kind, mask = EXPONENT_MASKS[dtype]
    values = np.frombuffer(raw, dtype=kind)
    return bool(((values & mask) == mask).any())


def _known_files(folder: Path) -> list[Path]:
    """The files beside the weights that belong to a model: config, tokenizer, index, card, licence."""
    names = {*CONFIG_FILES, *TOKENIZER_FILES, INDEX_NAME, "README.md"}
    found = [folder / name for name in sorted(names)]
    found += [path for pattern in CARRIED_FILES for path in sorted(folder.glob(pattern))]
    return [path for path in found if os.path.isfile(path)]


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not os.path.isfile(path):
        raise CheckpointError(f"{folder}: no config.json", hint="is this a Hugging Face model folder?")
    config = read_json(path)
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            "config.json: no `architectures`", hint='add it, for example "architectures": ["LlamaForCausalLM"]'
        )
    if "auto_map" in config:
        raise CheckpointError(
            "config.json: `auto_map` asks to run code that the model brings along",
            hint="remote code is never run; use a checkpoint of an architecture that transformers has itself",
        )
    quantized = config.get("quantization_config") or {}
    if not isinstance(quantized, dict):
        raise CheckpointError("config.json: `quantization_config` is not an object", hint="download it again")
    if quantized:
        method = quantized.get("quant_method", "some method")
        raise CheckpointError(
            f"config.json: the weights are quantized already ({method})", hint="start from the full-precision model"
        )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A model's JSON file, an object; {} where there is no such file. Raises CheckpointError."""
    if not os.path.isfile(path):
        return {}
    try:
        data = parse_json(read_limited(path, MAX_JSON_BYTES))
    except OSError as exc:
        raise CheckpointError(f"{path.name}: can't be read: {exc.strerror}", hint="check its permissions") from exc
    except ValueError as exc:
        raise CheckpointError(f"{path.name}: not JSON ({first_line(exc, 100)})", hint="download it again") from exc
    if not isinstance(data, dict):
        raise CheckpointError(f"{path.name}: not a JSON object", hint="download it again")
    return data


def tensor_table(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a folder's safetensors files, by name. Raises CheckpointError."""
    index = folder / INDEX_NAME
    if os.path.isfile(index):
        return _sharded(folder, index)
    single = folder / "model.safetensors"
    if os.path.isfile(single):
        _check_inside(folder, "model.safetensors", "the folder")
        tensors = read_header(single)
        if not tensors:
            raise CheckpointError("model.safetensors: has no tensors", hint="download it again")
        return tensors
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if shards:
        raise CheckpointError(f"{folder}: shards without {INDEX_NAME}", hint="download the index too")
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder}: the weights are pickled ({pickled[0]}); opening them could run any code",
            hint="convert them where you trust them: model.save_pretrained(folder, safe_serialization=True)",
        )
    raise CheckpointError(f"{folder}: no model.safetensors", hint="name a folder with safetensors weights")


def _sharded(folder: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = _weight_map(index)
    tensors: dict[str, TensorInfo] = {}
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        _check_inside(folder, shard, index.name)
    for shard in shards:
        if not os.path.isfile(folder / shard):
            raise CheckpointError(f"{index.name}: shard {shard} is missing", hint="download the model again")
    for shard in shards:  # one header at a time: links can name a large one ever again
        for name, info in read_header(folder / shard).items():
            if weight_map.get(name) != shard:
                raise CheckpointError(f"{shard}: tensor {name!r} is not where the index says", hint="rebuild the index")
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{shard}: tensor {name!r} is in the index, not in the shard")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index.name}: no `weight_map`", hint="download it again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not shard or "\0" in shard:
            raise CheckpointError(f"{index.name}: {shard!r} is not a file name")
    if len(weight_map) > MAX_TENSORS or len(set(weight_map.values())) > MAX_SHARDS:
        hint = f"at most {MAX_TENSORS:,} tensors in {MAX_SHARDS:,} shards are read"
        raise CheckpointError(f"{index.name}: too many tensors or shards", hint=hint)
    return weight_map


def _check_inside(folder: Path, name: str, said_by: str) -> None:
    """Refuse names that leave the folder. A symlink is fine when it stays inside, or in a hub cache's blobs."""
    try:
        target, root = (folder / name).resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as exc:  # a circle of links
        raise CheckpointError(
            f"{said_by}: {name!r} can't be followed", hint="this checkpoint can't be trusted"
        ) from exc
    within = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    plain = not Path(name).is_absolute() and ".." not in Path(name).parts
    if not plain or not any(target.is_relative_to(place) for place in within):
        raise CheckpointError(f"{said_by}: {name!r} leaves the folder", hint="this checkpoint can't be trusted")


def _check_dtypes(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> None:
    for tensor in tensors.values():
        if tensor.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{tensor.path.name}: tensor {tensor.name!r} is {tensor.dtype}; full precision is F16, BF16 or F32",
                hint="start from the checkpoint before it was quantized or converted",
            )
    if not any("embed" in name or "wte" in name for name in tensors):
        raise CheckpointError("the weights have no embedding tensor", hint="is this a whole model, not an adapter?")
    number_or(config, "vocab_size", 0)


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    if not any(os.path.isfile(checkpoint.folder / name) for name in VOCABULARY_FILES):
        raise CheckpointError(
            f"{checkpoint.folder}: no tokenizer ({', '.join(VOCABULARY_FILES[:3])})",
            hint="save it beside the weights: tokenizer.save_pretrained(folder)",
        )
    rows = max(
        (t.shape[0] for n, t in checkpoint.tensors.items() if "embed_tokens" in n and len(t.shape) == 2), default=0
    )
    vocabulary = read_json(checkpoint.folder / "tokenizer.json")
    ids = _token_ids(vocabulary)
    if rows and ids and max(ids) >= rows:
        raise CheckpointError(
            f"the tokenizer has ids up to {max(ids)}, the embedding only {rows} rows",
            hint="they are of different models, or the embedding was not resized after tokens were added",
        )


def _token_ids(tokenizer: Mapping[str, Any]) -> set[int]:
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids: set[int] = set()
    if isinstance(vocabulary, dict):
        ids.update(value for value in vocabulary.values() if isinstance(value, int))
    elif isinstance(vocabulary, list):
        ids.update(range(len(vocabulary)))
    added = tokenizer.get("added_tokens")
    for item in added if isinstance(added, list) else []:
        if isinstance(item, dict) and isinstance(item.get("id"), int):
            ids.add(item["id"])
    return ids
