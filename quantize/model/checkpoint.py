"""A local folder -> Checkpoint: its config, its tensor table, lazy reads and a content hash; every check before work.

In: a folder in the Hugging Face layout with safetensors weights. Out: a Checkpoint, or CheckpointError that names
what is damaged, unsafe or missing. Fetching from a hub, a package or a GGUF file is left to source.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import CheckpointError
from quantize.files.safetensors import INDEX_NAME, MAX_TENSORS, TensorInfo, read_header, read_tensor
from quantize.model.config import number_or
from quantize.model.folder_files import VOCABULARY_FILES, check_inside, known_files
from quantize.model.folder_files import read_chat_template as read_chat_template
from quantize.model.folder_files import read_json as read_json
from quantize.model.known_classes import known_without_code
from quantize.system.untrusted import open_regular

if TYPE_CHECKING:
    import torch

MAX_SHARDS = 10_000
WHOLE = "model.safetensors"
ADAPTER = "adapter_config.json"
FLOAT_DTYPES = ("F16", "BF16", "F32")
# What models compute for themselves, and files of some years hold all the same: frequencies, masks, positions.
COMPUTED = re.compile(
    r"(^|\.)rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$|\.(attn|attention)\.masked_bias$"
    r"|(^|\.)position_ids$"
)
MASK = re.compile(r"\.(attn|attention)\.bias$")
# Multiply by the exponent mask: a value is NaN or Inf where all exponent bits are set (IEEE 754; bfloat16 alike).
EXPONENT_MASKS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000)}


@dataclass(frozen=True)
class Checkpoint:
    """A full-precision model on disk. `tensors` lists every tensor by name, in the order of the shards.

    computed: tensors of the files that are not among them: the model computes them for itself. wide: what it computes
    is known to pass FP16's range.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    tokenizer_config: Mapping[str, Any]
    computed: tuple[str, ...] = field(default=(), compare=False)
    wide: bool = field(default=False, compare=False)

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
        return main_dtype((tensor.dtype, tensor.elements) for tensor in self.tensors.values())

    @property
    def half(self) -> str:
        """The type of 16 bits that holds weights and activations: BF16 where the weights are, or FP16 is too narrow."""
        return "BF16" if self.wide or self.dtype == "BF16" else "F16"

    @cached_property
    def chat_template(self) -> str | None:
        """The chat template; None if there is none."""
        return read_chat_template(self.folder)

    def files(self) -> list[Path]:
        """Every file that the model consists of: config, tokenizer, weights, licence, card; sorted by name."""
        found = {*known_files(self.folder), *(tensor.path for tensor in self.tensors.values())}
        return sorted(found, key=lambda path: path.relative_to(self.folder).as_posix())

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its own dtype and shape, read when asked for. Needs torch. Raises KeyError, CheckpointError."""
        return read_tensor(self.tensors[name])


def main_dtype(tensors: Iterable[tuple[str, int]]) -> str:
    """The dtype that most weights have. tensors: dtype and elements of each."""
    sizes: dict[str, int] = {}
    for dtype, elements in tensors:
        sizes[dtype] = sizes.get(dtype, 0) + elements
    return max(sorted(sizes), key=lambda name: sizes[name])


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder and check all that headers can tell.

    Raises CheckpointError: no config or architecture, pickled weights, links or index entries that leave the folder,
    missing shards, damaged tensors, weights that are quantized already, tokenizer missing or too large, files that
    can't be read.
    """
    config, found = read_model(folder)
    check_unquantized(config)
    tensors = {name: info for name, info in found.items() if not is_computed(info)}
    _check_dtypes(tensors, config)
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    computed = tuple(name for name in found if name not in tensors)
    checkpoint = Checkpoint(folder, config, tensors, tokenizer_config, computed)
    _check_tokenizer(checkpoint)
    return checkpoint


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """config.json and the tensors of a folder as they are, quantized or not. Raises as open_checkpoint does."""
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder}: no such folder", hint="name a folder with config.json and *.safetensors")
    for path in known_files(folder):
        if path.is_symlink():
            check_inside(folder, path.relative_to(folder).as_posix(), "the folder")
    return _config(folder), tensor_table(folder)


def is_computed(tensor: TensorInfo) -> bool:
    """Whether a tensor is one that models compute for themselves: a buffer that was saved with the weights."""
    is_mask = MASK.search(tensor.name) and len(tensor.shape) == 4  # GPT-2's, which is called as a bias would be
    return bool(COMPUTED.search(tensor.name) or is_mask)


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


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not os.path.isfile(path):
        _refuse_adapter(folder)
        raise CheckpointError(f"{folder}: no config.json", hint="is this a Hugging Face model folder?")
    config = read_json(path)
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            "config.json: no `architectures`", hint='add it, for example "architectures": ["LlamaForCausalLM"]'
        )
    if "auto_map" in config and not known_without_code(config):
        raise CheckpointError(
            "config.json: `auto_map` asks to run code that the model brings along",
            hint="remote code is never run; use a checkpoint of an architecture that transformers has itself",
        )
    return {key: value for key, value in config.items() if key != "auto_map"}


def check_unquantized(config: Mapping[str, Any]) -> None:
    """Refuse weights that are quantized already. Raises CheckpointError."""
    quantized = config.get("quantization_config") or {}
    if not isinstance(quantized, dict):
        raise CheckpointError("config.json: `quantization_config` is not an object", hint="download it again")
    if quantized:
        method = quantized.get("quant_method", "some method")
        raise CheckpointError(
            f"config.json: the weights are quantized already ({method})", hint="start from the full-precision model"
        )


def tensor_table(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a folder's safetensors files, by name: of one file, if there is one. Raises CheckpointError.

    transformers reads them in this order too (PreTrainedModel.from_pretrained); an index beside is of another save.
    """
    index, single = folder / INDEX_NAME, folder / WHOLE
    if os.path.isfile(single):
        check_inside(folder, WHOLE, "the folder")
        tensors = read_header(single)
        if not tensors:
            raise CheckpointError("model.safetensors: has no tensors", hint="download it again")
        return tensors
    if os.path.isfile(index):
        return _sharded(folder, index)
    _refuse_adapter(folder)
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
        check_inside(folder, shard, index.name)
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


def _refuse_adapter(folder: Path) -> None:
    path = folder / ADAPTER
    if os.path.isfile(path):
        base = read_json(path).get("base_model_name_or_path")
        whose = f"of {base}" if isinstance(base, str) and base else "and does not say of which model"
        hint = f"name {base if isinstance(base, str) and base else 'its base'} as `model` and this folder as `adapter`"
        raise CheckpointError(f"{folder}: this is an adapter {whose}, not a model", hint=hint)


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
