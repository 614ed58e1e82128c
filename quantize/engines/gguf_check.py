"""A GGUF artifact against its source checkpoint: nothing lost, nothing added, same template and special tokens.

In: the artifact's header and the checkpoint. Out: nothing, or VerifyError that names what differs.
Whether it runs is tried in engines/llama_cpp.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from quantize.checkpoint import Checkpoint, read_json
from quantize.containers.gguf import GgufFile
from quantize.errors import VerifyError
from quantize.shape import ModelShape

SPECIAL_TOKENS = {"bos": "tokenizer.ggml.bos_token_id", "eos": "tokenizer.ggml.eos_token_id"}
MADE_BY_LLAMA_CPP = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def compare_with_source(file: GgufFile, checkpoint: Checkpoint) -> None:
    """Raise VerifyError unless tensors, sizes, chat template and special tokens are the source's own."""
    _compare_tensors(file, checkpoint)
    _compare_elements(file, checkpoint)
    _compare_template(file, checkpoint)
    _compare_special_tokens(file, checkpoint)


def _compare_tensors(file: GgufFile, checkpoint: Checkpoint) -> None:
    """Each tensor that llama.cpp's own name table can name must be there: once as itself, or merged per expert."""
    names = name_map(str(file.fields.get("general.architecture")), checkpoint)
    have = set(file.tensors)
    for tensor in checkpoint.tensors:
        mapped = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if mapped is not None and mapped not in have:
            raise VerifyError(f"{file.path.name}: tensor {mapped} of the source's {tensor} is missing")


def _compare_elements(file: GgufFile, checkpoint: Checkpoint) -> None:
    total = 0
    for tensor in file.tensors.values():
        if tensor.name in MADE_BY_LLAMA_CPP:
            continue
        count = 1
        for number in tensor.shape:
            count *= number
        total += count
    tied = sum(t.elements for n, t in checkpoint.tensors.items() if n.endswith("embed_tokens.weight"))
    if total not in (checkpoint.parameters, checkpoint.parameters - tied, checkpoint.parameters + tied):
        raise VerifyError(f"{file.path.name}: {total:,} weights, the source has {checkpoint.parameters:,}")


def _compare_template(file: GgufFile, checkpoint: Checkpoint) -> None:
    template = file.fields.get("tokenizer.chat_template")
    if checkpoint.chat_template is not None and template != checkpoint.chat_template:
        what = "is lost" if template is None else "differs from the source's"
        raise VerifyError(f"{file.path.name}: the chat template {what}", hint="chat would answer nonsense")


def _compare_special_tokens(file: GgufFile, checkpoint: Checkpoint) -> None:
    tokenizer = checkpoint.folder / "tokenizer.json"
    if not tokenizer.is_file():
        return
    ids = _ids_by_text(read_json(tokenizer))
    for kind, field in SPECIAL_TOKENS.items():
        text = checkpoint.tokenizer_config.get(f"{kind}_token")
        text = text.get("content") if isinstance(text, dict) else text
        wanted = ids.get(text) if isinstance(text, str) else None
        found = file.fields.get(field)
        if wanted is not None and found is not None and found != wanted:
            raise VerifyError(f"{file.path.name}: {kind} token is {found}, the source's {text!r} is {wanted}")
        if wanted is not None and found is None and kind == "eos":
            raise VerifyError(f"{file.path.name}: no {kind} token; the source has {text!r} ({wanted})")


def _ids_by_text(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    for item in added if isinstance(added, list) else []:
        if isinstance(item, dict) and isinstance(item.get("content"), str) and isinstance(item.get("id"), int):
            ids[item["content"]] = item["id"]
    return ids


def name_map(architecture: str, checkpoint: Checkpoint) -> Any:
    """llama.cpp's own table from the source's tensor names to its own. Raises VerifyError: no such architecture."""
    return _name_map(architecture, _blocks(checkpoint))


def _blocks(checkpoint: Checkpoint) -> int:
    return ModelShape.from_config(checkpoint.config).layers


@cache
def _name_map(architecture: str, blocks: int) -> Any:
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in kinds:
        raise VerifyError(f"general.architecture is {architecture!r}, which the gguf package does not know")
    return gguf.get_tensor_name_map(kinds[architecture], blocks)
