"""What builders of folders in the Hugging Face layout share, whatever the linears become.

In: a checkpoint, the names of the tensors that a linear becomes. Out: the table of what is written, in a fixed order;
config.json with its quantization_config; the tokenizer. Nothing is read but headers.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from quantize.errors import PlanError
from quantize.files.shards import files_bytes, table_bytes
from quantize.formats.base import Context, KeptTensor, LeftOut, SizePlan, StoredIn
from quantize.model.anatomy.found import Anatomy
from quantize.model.architecture import anatomy_of, block_layouts
from quantize.model.belonging import COMPUTED, prediction_tensors
from quantize.model.checkpoint import Checkpoint
from quantize.model.folder_files import CONFIG_FILES, processor_files, tokenizer_files
from quantize.model.towers import APART, tower_modules, tower_tensors

Shape = tuple[int, ...]
LinearTable = Callable[[int, int], dict[str, tuple[str, Shape]]]  # (out, in) -> suffix -> (dtype, shape)
STORED_DTYPE = "F16"
CARRIED_DTYPES = ("F16", "BF16")  # in which what is carried over stays bit by bit
AFTER = re.compile(r"(model\.layers\.\d+)\.")  # a block, which is one after the last where it predicts ahead
DTYPE_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


@dataclass(frozen=True)
class TensorLayout:
    """Every tensor of the artifact in writing order, and the linears that are packed."""

    table: dict[str, tuple[str, Shape]]
    packed: frozenset[str]


def plan_layout(checkpoint: Checkpoint, linear_table: LinearTable, stored_dtype: str = STORED_DTYPE) -> TensorLayout:
    """The tensors that the artifact will have: outside the blocks first, then block after block, the head last.

    Raises CheckpointError: an architecture whose blocks are not known.
    """
    config = checkpoint.config
    packed = {linear.tensor for layout in block_layouts(config) for linear in layout.linears}
    apart = tower_tensors(checkpoint)
    table: dict[str, tuple[str, Shape]] = {}
    for name in sorted(checkpoint.tensors, key=partial(_order, anatomy_of(config))):
        shape = checkpoint.tensors[name].shape
        if name in packed:
            prefix = name.removesuffix("weight")
            table.update({prefix + suffix: entry for suffix, entry in linear_table(shape[0], shape[1]).items()})
        else:
            own = checkpoint.tensors[name].dtype
            table[name] = (own if name in apart and own in CARRIED_DTYPES else stored_dtype, shape)
    return TensorLayout(table, frozenset(packed))


def _order(anatomy: Anatomy, name: str) -> tuple[int, int, str]:
    block = anatomy.block_of(name)
    if block is not None:
        return (1, block, name)
    return (0 if "embed" in name else 2, 0, name)


def size_plan(
    checkpoint: Checkpoint, layout: TensorLayout, config_text: str, stored_dtype: str = STORED_DTYPE
) -> SizePlan:
    """Exact bytes of the weight files, and of what is copied beside them."""
    weights = table_bytes(layout.table)
    beside = sum(path.stat().st_size for path in copied_files(checkpoint)) + len(config_text.encode())
    bits = round(8 * weights / checkpoint.parameters, 4)
    kept = kept_tensors(checkpoint, layout, stored_dtype)
    return SizePlan(files_bytes(layout.table) + beside, weights, len(layout.table), bits, kept)


def kept_tensors(
    checkpoint: Checkpoint, layout: TensorLayout, stored_dtype: str = STORED_DTYPE
) -> tuple[KeptTensor, ...]:
    """Every tensor that is not packed, with the reason."""
    kept, ahead, anatomy = [], frozenset(prediction_tensors(checkpoint)), anatomy_of(checkpoint.config)
    apart = tower_tensors(checkpoint)
    reasons = {name: reason for found in block_layouts(checkpoint.config) for name, reason in found.kept}
    for name in sorted(set(checkpoint.tensors) - layout.packed):
        if name in apart:
            reason = f"{APART}: carried over as it is"
        elif name in ahead:
            reason = "heads that predict several tokens ahead (MTP) stay unquantized"
        elif anatomy.block_of(name) is None:
            reason = "embedding, head and final norm stay unquantized in this format"
        elif len(checkpoint.tensors[name].shape) <= 1:
            reason = "norms and biases stay unquantized"
        else:
            reason = reasons.get(name, "no linear of a block was found to read with it")
        kept.append(KeptTensor(name, layout.table[name][0], reason))
    return tuple(kept)


def left_out(checkpoint: Checkpoint) -> tuple[LeftOut, ...]:
    """What the source's files hold and the artifact does not."""
    return tuple(LeftOut(name, COMPUTED) for name in checkpoint.computed)


def stored_in(checkpoint: Checkpoint, *, by_itself: str = STORED_DTYPE) -> StoredIn | None:
    """What is said of `Checkpoint.half`; None where a format stores that, or float32, by itself."""
    if by_itself in (checkpoint.half, "F32"):
        return None
    wide = "the source's activations come near the end of FP16's range or pass it: it does not run in FP16"
    reason = wide if checkpoint.wide else "the source's own type"
    return StoredIn(checkpoint.half, reason)


def unconverted(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The modules of towers, and of heads that predict ahead: what runtimes are to leave as it is, which take each
    linear as quantized. Raises CheckpointError.
    """
    return (*tower_modules(checkpoint), *unquantized_heads(checkpoint))


def linear_shapes(checkpoint: Checkpoint) -> Iterator[tuple[str, int, int]]:
    """Tensor, outputs and inputs of each linear of a block. Raises PlanError: one is not there; CheckpointError."""
    for layout in block_layouts(checkpoint.config):
        for linear in layout.linears:
            info = checkpoint.tensors.get(linear.tensor)
            if info is None:
                raise PlanError(f"the checkpoint lacks {linear.tensor}", hint="does its config.json belong to it?")
            out, width = info.shape
            yield linear.tensor, out, width


def unquantized_linears(checkpoint: Checkpoint) -> list[str]:
    """The head, the routers, and all else that runtimes are to leave as it is, by full name: they match parts of names,
    and `gate` is a part of `gate_proj`. Raises CheckpointError.
    """
    names = ["lm_head"]
    for layout in block_layouts(checkpoint.config):
        for group in layout.groups:
            names += [name.removesuffix(".weight") for name in group.passengers if name.endswith(".weight")]
    return list(dict.fromkeys([*names, *kept_modules(checkpoint), *unconverted(checkpoint)]))


def kept_modules(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The linears of blocks that stay as they are, by the names of the files, and by transformers' where a model that
    reads more than text has other ones.
    """
    anatomy, names = anatomy_of(checkpoint.config), list[str]()
    for layout in block_layouts(checkpoint.config):
        inside = f"{anatomy.blocks}.{layout.index}."
        for tensor in (name for name, _ in layout.kept if name.endswith(".weight")):
            renamed = inside + layout.module_path(tensor)
            names += [tensor, renamed] if anatomy.towers else [tensor]
    return tuple(dict.fromkeys(name.removesuffix(".weight") for name in names))


def unquantized_heads(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The modules that hold heads that predict ahead (MTP), for runtimes that take each linear as quantized."""
    names = prediction_tensors(checkpoint)
    found = (match[1] if (match := AFTER.match(name)) else name.partition(".")[0] for name in names)
    return tuple(dict.fromkeys(found))


def config_text(
    checkpoint: Checkpoint, quantization_config: Mapping[str, Any], dtype: str = "float16",
    also: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """config.json of the artifact: the source's, with the dtype of what stays unquantized and how the rest was.
    also: what else a runtime looks for.
    """
    config = {key: value for key, value in checkpoint.config.items() if key not in {"torch_dtype", "_name_or_path"}}
    config |= {"dtype": dtype, "quantization_config": dict(quantization_config), **(also or {})}
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def copied_files(checkpoint: Checkpoint) -> list[Path]:
    """Tokenizer, generation settings, what prepares images and sound: they go along unchanged."""
    own = [name for name in CONFIG_FILES if name != "config.json"]
    names = [*own, *tokenizer_files(checkpoint.folder), *processor_files(checkpoint.folder)]
    return [checkpoint.folder / name for name in names if (checkpoint.folder / name).is_file()]


def write_beside(context: Context, text: str) -> tuple[str, ...]:
    """Write config.json and copy the tokenizer into staging; the names of what was written."""
    (context.staging / "config.json").write_text(text, encoding="utf-8")
    names = [path.relative_to(context.checkpoint.folder).as_posix() for path in copied_files(context.checkpoint)]
    for name in names:
        (context.staging / name).parent.mkdir(exist_ok=True)  # of named chat templates
        shutil.copyfile(context.checkpoint.folder / name, context.staging / name)
    return ("config.json", *names)
