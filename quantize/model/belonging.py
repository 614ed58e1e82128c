"""Whether the files of a checkpoint are of one model: tensors, config.json, generation settings, tokenizer.

In: a checkpoint's headers and JSON files. Out: the tensors that its class has no place for, or CheckpointError with
both numbers, before any work and for every format alike. What headers tell is told without torch; the rest by
transformers, which builds the class of config.json without memory for weights and says what it would miss. Reads no
weights.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from quantize.errors import CheckpointError, first_line, some_of
from quantize.events import Reporter, status
from quantize.files.shards import torch_dtype
from quantize.model.checkpoint import Checkpoint
from quantize.model.config import first_number, text_part
from quantize.model.folder_files import CONFIG_FILES, processor_files, read_json, tokenizer_files
from quantize.model.processor import check_processor, check_with_transformers
from quantize.system.cache import Cache, hash_file
from quantize.system.digest import canonical_hash
from quantize.system.process import run_step

RULES_VERSION = 1  # of what is looked at
TOOLS = ("torch", "transformers", "tokenizers")
_found_before: dict[str, tuple[str, ...]] = {}  # by this process

BLOCK = re.compile(r"^model\.layers\.(\d+)\.")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PREDICTION_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers")
PREDICTION = re.compile(r"(^|\.)mtp(_|\.|$)|\.(eh_proj|enorm|hnorm|shared_head)\.")
NUMBERS = {
    "temperature": float, "top_p": float, "min_p": float, "typical_p": float, "repetition_penalty": float,
    "length_penalty": float, "top_k": int, "max_length": int, "max_new_tokens": int, "min_length": int,
    "num_beams": int, "no_repeat_ngram_size": int,
}  # fmt: skip
COMPUTED = "the model computes it for itself"  # why a tensor of the source is in no artifact
NAMED = 3  # tensors that an error names


def prediction_tensors(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The tensors of heads that predict several tokens ahead (MTP): named so, or in blocks after the last."""
    blocks = _said_blocks(checkpoint)
    return tuple(name for name in checkpoint.tensors if PREDICTION.search(name) or _is_after(name, blocks))


def check_headers(checkpoint: Checkpoint) -> None:
    """What is known from headers and JSON alone. Raises CheckpointError."""
    _check_generation(read_json(checkpoint.folder / "generation_config.json"))
    check_processor(checkpoint.folder)
    _check_blocks(checkpoint)
    config, tensors = text_part(checkpoint.config), checkpoint.tensors
    rows = tensors[EMBEDDING].shape[0] if EMBEDDING in tensors else None
    said = first_number(config, ("vocab_size",))
    if rows is not None and said and rows != said:
        raise CheckpointError(
            f"config.json says `vocab_size` {said}, the embedding has {rows} rows",
            hint=f"write {rows} if the embedding is right; else resize it, or take the config.json that belongs to it",
        )
    untied = checkpoint.config.get("tie_word_embeddings", config.get("tie_word_embeddings")) is False
    if untied and rows is not None and HEAD not in tensors and checkpoint.architecture.endswith("ForCausalLM"):
        raise CheckpointError(
            f"the head is missing: there is no {HEAD}, and config.json says `tie_word_embeddings`: false",
            hint="save the model with its head; or write true there if the head is the embedding",
        )


def check_belongs(checkpoint: Checkpoint, cache: Cache, reporter: Reporter) -> tuple[str, ...]:
    """The tensors that have no place in the model that config.json describes; all else that is wrong is an error.

    What was found out is remembered by all that it depends on. Without torch and transformers only what headers tell
    is looked at. Raises CheckpointError.
    """
    check_headers(checkpoint)
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        return ()
    tensors = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    key = _key(checkpoint, tensors)
    if key not in _found_before:

        def find() -> list[str]:
            status(reporter, "", "looking whether config.json, tensors and tokenizer are of one model")
            return run_step("looking at the source", reporter, ask_class, checkpoint.folder, tensors)

        _found_before[key] = tuple(cache.fact(f"belongs:{key}", find))
    return _found_before[key]


def _key(checkpoint: Checkpoint, tensors: Mapping[str, Any]) -> str:
    files = [*CONFIG_FILES, *tokenizer_files(checkpoint.folder), *processor_files(checkpoint.folder)]
    hashes = {name: hash_file(checkpoint.folder / name) for name in files if (checkpoint.folder / name).is_file()}
    return canonical_hash({
        "rules": RULES_VERSION, "tools": {name: metadata.version(name) for name in TOOLS}, "files": hashes,
        "tensors": {name: [dtype, list(shape)] for name, (dtype, shape) in tensors.items()},
    })  # fmt: skip


def ask_class(_reporter: Reporter, folder: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """Have transformers build the class of config.json and load tensors without bytes into it; needs torch.

    tensors: name -> dtype, shape. Returns the names that have no place in the class; none where transformers does not
    know the class, of which nothing can be told. Raises CheckpointError: what the class needs is not there, or of
    another shape; config.json, the generation settings or the tokenizer are none that transformers takes.
    """
    import transformers
    from transformers import AutoConfig

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    written = read_json(folder / "config.json")
    name = str(written["architectures"][0])
    known = getattr(transformers, name, None)
    if known is None or written.get("model_type") not in transformers.CONFIG_MAPPING:
        return []
    _check_kind(name, str(written["model_type"]))
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as exc:
        said = " ".join(str(exc).split())[:300]
        hint = "compare it with the one that the model was published with"
        raise CheckpointError(f"config.json: transformers does not take it: {said}", hint=hint) from exc
    _check_with_transformers(folder)
    return _without_place(known, config, tensors)


def _check_kind(name: str, model_type: str) -> None:
    """A class that writes text on, alone or as a part. Raises CheckpointError."""
    from transformers.models.auto import modeling_auto as auto

    writers = (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
               auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)  # fmt: skip
    names = {item for kind in writers for value in kind.values() for item in (value if isinstance(value, tuple)
             else (value,))}  # fmt: skip
    if name in names:
        return
    own = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    hint = f"a {own} of this family works; " if own else ""
    raise CheckpointError(
        f"config.json: {name} is no causal language model: it does not write text on",
        hint=f"{hint}models that classify, embed or translate are not quantized here",
    )


def _without_place(known: Any, config: Any, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    import torch

    empty = {
        name: torch.empty(shape, dtype=torch_dtype(dtype), device="meta") for name, (dtype, shape) in tensors.items()
    }
    try:
        _, found = known.from_pretrained(
            None, config=config, state_dict=empty, output_loading_info=True, device_map={"": "meta"},
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as exc:
        what = f"transformers can't build a {known.__name__} of config.json and these tensors: {first_line(exc)}"
        raise CheckpointError(what, hint="does config.json belong to the weights?") from exc
    _refuse_missing(known.__name__, sorted(found["missing_keys"]))
    for name, in_files, in_class in sorted(found["mismatched_keys"], key=lambda item: str(item[0])):
        raise CheckpointError(
            f"{name} is {list(in_files)} in the files, a {known.__name__} by config.json has it as {list(in_class)}",
            hint="does config.json belong to the weights?",
        )
    return sorted(map(str, found["unexpected_keys"]))


def _refuse_missing(architecture: str, missing: list[str]) -> None:
    if missing:
        raise CheckpointError(
            f"the files lack what a {architecture} by config.json has: {some_of(missing, NAMED)}",
            hint="does config.json belong to the weights? Save the whole model again",
        )


def _check_with_transformers(folder: Path) -> None:
    """The generation settings, the tokenizer and what prepares images, as whoever runs the model reads them."""
    from transformers import AutoTokenizer, GenerationConfig

    if (folder / "generation_config.json").is_file():
        try:
            GenerationConfig.from_pretrained(folder, local_files_only=True).validate()
        except Exception as exc:
            what = f"generation_config.json: transformers does not take it: {first_line(exc, 300)}"
            raise CheckpointError(what, hint="mend the key that is named, or remove it") from exc
    try:
        AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as exc:  # tokenizers raises bare Exceptions
        lacks = "" if (folder / "tokenizer_config.json").is_file() else "; there is no tokenizer_config.json"
        raise CheckpointError(
            f"transformers does not load the tokenizer: {first_line(exc)}{lacks}",
            hint="copy all tokenizer files from where the model was published",
        ) from exc
    check_with_transformers(folder)


def _check_generation(settings: Mapping[str, Any]) -> None:
    for key, kind in NUMBERS.items():
        value = settings.get(key)
        wrong = isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float))
        if value is not None and wrong:
            what = "a whole number" if kind is int else "a number"
            raise CheckpointError(
                f"generation_config.json: `{key}` must be {what}, found {value!r}",
                hint=f"write it without quotes, or remove `{key}`",
            )


def _check_blocks(checkpoint: Checkpoint) -> None:
    """As many decoder blocks in the files as config.json says, but for those of heads that predict ahead."""
    said = _said_blocks(checkpoint)
    found = {int(match[1]) for name in checkpoint.tensors if (match := BLOCK.match(name))}
    if said is None or not found:
        return
    beyond = {index for index in found if index >= said}
    total = len(found) - (len(beyond) if _predicts(checkpoint, beyond) else 0)
    if total == said:
        return
    raise CheckpointError(
        f"config.json says {said} blocks (`num_hidden_layers`), the files have {total}",
        hint="does config.json belong to the weights? Write the number that the files have if all of them are meant",
    )


def _predicts(checkpoint: Checkpoint, blocks: set[int]) -> bool:
    """Whether blocks after the last one are of heads that predict ahead, by config.json or by what is in them."""
    if any(first_number(text_part(checkpoint.config), (key,)) for key in PREDICTION_KEYS):
        return True
    return bool(blocks) and any(
        PREDICTION.search(name) for name in checkpoint.tensors
        if (match := BLOCK.match(name)) and int(match[1]) in blocks
    )  # fmt: skip


def _said_blocks(checkpoint: Checkpoint) -> int | None:
    return first_number(text_part(checkpoint.config), ("num_hidden_layers",))


def _is_after(name: str, blocks: int | None) -> bool:
    match = BLOCK.match(name)
    return bool(match and blocks is not None and int(match[1]) >= blocks)
