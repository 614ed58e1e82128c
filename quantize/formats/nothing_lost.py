"""A folder in the Hugging Face layout held against its source: each weight is quantized, folded or carried.

In: an artifact's folder, the source's checkpoint. Out: how many tensors of each, or VerifyError that names what is lost
or changed. What is carried must be the source's values in the type that they are stored in; what is quantized must have
as many weights. Runs in a worker: it reads what is carried, one tensor at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.errors import VerifyError
from quantize.files.safetensors import TensorInfo, read_tensor
from quantize.model.architecture import anatomy_of
from quantize.model.checkpoint import Checkpoint, read_json, tensor_table
from quantize.model.quantized import dequantized_table

WORD_BITS = 32
WORDS = "qweight"
STACKED = re.compile(r"^(.*\.experts\.)(gate_up_proj|down_proj)$")  # all experts of a block in one tensor
DOWN = ("down_proj", "w2")
REBUILD = "the artifact is damaged, or was made by other versions: build it again with --force"


def account(folder: Path, checkpoint: Checkpoint, *, folds: bool = False) -> dict[str, Any]:
    """Find every tensor of the source again. folds: scales may be in what a block keeps in high precision.

    Returns how many tensors are carried, quantized, and carried with what was folded in. Raises VerifyError.
    """
    have = tensor_table(folder)
    config = read_json(folder / "config.json")
    settings = config.get("quantization_config")
    bits = settings.get("bits") if isinstance(settings, dict) else None
    quantized = _compressed(have, config)
    counts = {"carried": 0, "folded": 0, "quantized": 0}
    anatomy = anatomy_of(checkpoint.config) if folds else None
    for name, info in checkpoint.tensors.items():
        weights = quantized.get(name, _quantized_weights(name, have, bits))
        if weights is not None:
            if weights != info.elements:
                raise VerifyError(
                    f"{folder.name}: {name} has {weights:,} quantized weights, the source {info.elements:,}",
                    hint=REBUILD,
                )
            counts["quantized"] += 1
            continue
        if name not in have:
            raise VerifyError(f"{folder.name}: tensor {name} of the source is lost", hint=REBUILD)
        kind = "folded" if anatomy is not None and anatomy.block_of(name) is not None else "carried"
        _compare(folder, name, have[name], checkpoint, values=kind == "carried")
        counts[kind] += 1
    return counts


def _compressed(have: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, int]:
    """How many weights each quantized tensor of a compressed-tensors artifact has; nothing of other formats."""
    settings = config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != "compressed-tensors":
        return {}
    table = dequantized_table(have, config)
    return {name: math.prod(item.shape) for name, item in table.items() if item.read is not None}


def _quantized_weights(name: str, have: Mapping[str, TensorInfo], bits: int | None) -> int | None:
    """How many weights of a tensor the artifact has quantized; None where it has none."""
    if (stacked := STACKED.match(name)) is not None and name not in have:
        parts = [item for item in have if item.startswith(stacked[1]) and item.endswith(f".{WORDS}")]
        down = [item for item in parts if item.split(".")[-2] in DOWN]
        found = down if stacked[2] == DOWN[0] else [item for item in parts if item not in down]
        return sum(have[item].elements for item in found) * WORD_BITS // (bits or WORD_BITS) if found else None
    stem = name.removesuffix("weight")
    if (words := have.get(f"{stem}{WORDS}")) is not None:
        return words.elements * WORD_BITS // (bits or WORD_BITS)
    if f"{stem}scales" in have and name in have and have[name].dtype == "U32":
        return have[name].elements * WORD_BITS // (bits or WORD_BITS)
    if f"{stem}SCB" in have and name in have:
        return have[name].elements
    if f"{name}.absmax" in have and name in have:
        return have[name].elements * 2
    return None


def _compare(folder: Path, name: str, found: TensorInfo, checkpoint: Checkpoint, *, values: bool) -> None:
    import torch

    wanted = checkpoint.tensors[name]
    if found.shape != wanted.shape:
        what = f"{folder.name}: tensor {name} is {list(found.shape)}, in the source {list(wanted.shape)}"
        raise VerifyError(what, hint=REBUILD)
    if not values:
        return
    ours = read_tensor(found)
    if not torch.equal(ours, checkpoint.read(name).to(ours.dtype)):
        raise VerifyError(f"{folder.name}: tensor {name} has other values than the source's", hint=REBUILD)
