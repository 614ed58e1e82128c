"""A folder as people have it -> what must be done before it is a checkpoint; None where it is one already.

In: a model's folder, its headers, the folders of a tokenizer and an adapter. Out: a Mending: which names are written
otherwise, how weights that were quantized are read, what is merged. Told from headers and JSON; the work is left to
mended.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import CheckpointError
from quantize.files.safetensors import INDEX_NAME, TensorInfo
from quantize.model.checkpoint import ADAPTER, WHOLE, read_json
from quantize.model.folder_files import (
    CARRIED_FILES,
    CONFIG_FILES,
    PROCESSOR_FILES,
    VOCABULARY_FILES,
    known_files,
    tokenizer_files,
)
from quantize.model.quantized import method_of, only_claimed

RULES_VERSION = 1  # enters the key of what is made
TRAINING_PREFIXES = ("_orig_mod.", "base_model.model.", "module.")
DECODER_PREFIXES = ("model.language_model.", "language_model.model.")
DECODER_PARTS = ("layers.", "embed_tokens.", "norm.")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
OLD_TEMPLATE, TEMPLATE = "chat_template.json", "chat_template.jinja"

Renames = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Mending:
    """What a model's files need. folder: theirs.

    renames: what names begin with -> what they begin with then, the first that fits. method: how the weights were
    quantized, None if they were not. claimed: the method that config.json names of weights that are plain floats.
    tokenizer, adapter: folders. template: take it from chat_template.json, where transformers' tokenizers don't look.
    remarks: what is done, in words.
    """

    folder: Path
    renames: Renames = ()
    method: str | None = None
    tokenizer: Path | None = None
    adapter: Path | None = None
    template: bool = False
    remarks: tuple[str, ...] = ()
    claimed: str | None = None

    @property
    def changes_weights(self) -> bool:
        """Whether weights are written anew, or only lie beside other files."""
        return bool(self.renames or self.method or self.adapter)

    def files(self, tensors: Mapping[str, TensorInfo]) -> dict[str, Path]:
        """Every file that the model consists of, by the name that pins it."""
        own = {path.relative_to(self.folder).as_posix(): path for path in known_files(self.folder)}
        own |= {info.path.relative_to(self.folder).as_posix(): info.path for info in tensors.values()}
        if WHOLE in own:
            own.pop(INDEX_NAME, None)
        if self.tokenizer is not None:
            for name in tokenizer_files(self.folder):
                own.pop(name, None)
            own |= {f"tokenizer/{name}": self.tokenizer / name for name in tokenizer_files(self.tokenizer)}
        if self.adapter is not None:
            own |= {f"adapter/{name}": self.adapter / name for name in (ADAPTER, ADAPTER_WEIGHTS)}
        return dict(sorted(own.items()))

    def beside(self) -> dict[str, Path]:
        """The files that lie beside the weights of what is made, by name."""
        names = [path.name for pattern in (*CARRIED_FILES, "README.md") for path in sorted(self.folder.glob(pattern))]
        names = [*CONFIG_FILES, *PROCESSOR_FILES, *names]
        found = {name: self.folder / name for name in names if os.path.isfile(self.folder / name)}
        source = self.tokenizer or self.folder
        return found | {name: source / name for name in tokenizer_files(source)}


def find_mending(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], tokenizer: Path | None = None,
    adapter: Path | None = None,
) -> Mending | None:  # fmt: skip
    """What a folder needs; None if nothing. Raises CheckpointError: the tokenizer or the adapter is none."""
    _check_tokenizer(tokenizer)
    _check_adapter(adapter)
    claimed = only_claimed(tensors, config)
    method = None if claimed else method_of(config)
    renames, remarks = find_renames(tensors, config)
    if _has_stale_index(folder):
        what = f"{folder.name} has two sets of weights: {WHOLE} is taken, as transformers takes it, not those of "
        remarks.append(what + INDEX_NAME)
    template = _only_old_template(tokenizer or folder)
    if template:
        remarks.append(f"the chat template is that of {OLD_TEMPLATE}")
    if method is not None:
        remarks.append(f"the weights were quantized before ({method}): they are dequantized to 16 bits")
    if claimed is not None:
        what = f"config.json says that the weights are quantized ({claimed}), and every tensor is a plain float"
        remarks.append(f"{what}: they are taken as they are, and what it says is left out")
    if adapter is not None:
        remarks.append(_about(adapter))
    if not (remarks or tokenizer):
        return None
    return Mending(folder, renames, method, tokenizer, adapter, template, tuple(remarks), claimed)


def find_renames(names: Iterable[str], config: Mapping[str, Any]) -> tuple[Renames, list[str]]:
    """What training has left before the names of all tensors, and what to say of it; () where nothing is known.

    A decoder that was saved as a part of a larger model, or without its wrapper, gets the names that it has alone.
    """
    left = list(names)
    prefix = ""
    while left and (
        found := next((item for item in TRAINING_PREFIXES if all(n.startswith(prefix + item) for n in left)), "")
    ):
        prefix += found
    remarks = [f"all names of tensors begin with `{prefix}`: it is left off"] if prefix else []
    renames = [(prefix, "")] if prefix else []
    inner = [name.removeprefix(prefix) for name in left]
    architecture = str((config.get("architectures") or [""])[0])
    if architecture.endswith("ForCausalLM") and not isinstance(config.get("text_config"), Mapping):
        more, said = _decoder_renames(inner, prefix)
        renames, remarks = [*more, *renames], remarks + said
    return tuple(renames), remarks


def _decoder_renames(names: list[str], prefix: str) -> tuple[list[tuple[str, str]], list[str]]:
    for part in DECODER_PREFIXES:
        if any(name.startswith(part) for name in names) and not any(n.startswith("model.layers.") for n in names):
            head = (f"{prefix}language_model.lm_head.", "lm_head.")
            return [(prefix + part, "model."), head], [f"names begin with `{part}`: they are read as `model.`"]
    if "embed_tokens.weight" in names and any(name.startswith("layers.") for name in names):
        wrapped = [(prefix + item, f"model.{item}") for item in DECODER_PARTS]
        return wrapped, ["names lack `model.`: it is put before them"]
    return [], []


def renamed(name: str, renames: Renames) -> str:
    """The name of a tensor once it is mended."""
    for old, new in renames:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _has_stale_index(folder: Path) -> bool:
    if not (os.path.isfile(folder / WHOLE) and os.path.isfile(folder / INDEX_NAME)):
        return False
    listed = read_json(folder / INDEX_NAME).get("weight_map")
    return not isinstance(listed, dict) or set(map(str, listed.values())) != {WHOLE}


def _only_old_template(folder: Path) -> bool:
    """Whether the only chat template is in a file that transformers reads for processors, not for tokenizers."""
    if not isinstance(read_json(folder / OLD_TEMPLATE).get("chat_template"), str):
        return False
    newer = os.path.isfile(folder / TEMPLATE) or (folder / "additional_chat_templates").is_dir()
    return not newer and read_json(folder / "tokenizer_config.json").get("chat_template") is None


def _check_tokenizer(folder: Path | None) -> None:
    if folder is not None and not any(os.path.isfile(folder / name) for name in VOCABULARY_FILES):
        raise CheckpointError(
            f"source: tokenizer {folder}: no tokenizer there ({', '.join(VOCABULARY_FILES[:3])})",
            hint="name the folder that tokenizer.save_pretrained(folder) wrote",
        )


def _check_adapter(folder: Path | None) -> None:
    if folder is None:
        return
    for name in (ADAPTER, ADAPTER_WEIGHTS):
        if not os.path.isfile(folder / name):
            raise CheckpointError(
                f"source: adapter {folder}: no {name}",
                hint="name the folder that PEFT's model.save_pretrained(folder) wrote, with safetensors weights",
            )


def _about(adapter: Path) -> str:
    base = read_json(adapter / ADAPTER).get("base_model_name_or_path")
    return f"the adapter {adapter.name}, trained on {base or 'a model that it does not name'}, is merged"
