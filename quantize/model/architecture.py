"""A config.json -> the layout of each decoder block: which linears share an input, what feeds them, what stays.

In: a model's config.json as a dictionary. Out: BlockLayouts, from the anatomy that was found by running a small model
of the same class: no architecture is named here. Left to others: finding it (anatomy), reading tensors (checkpoint),
running blocks (calibration). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quantize.errors import CheckpointError
from quantize.model.anatomy.cached import cached_anatomy
from quantize.model.anatomy.found import Anatomy
from quantize.model.config import LAYER_KEYS, number, text_part
from quantize.model.layout import BlockLayout

Config = Mapping[str, Any]

MAX_BLOCKS = 1_000
MAX_EXPERTS = 4_096
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def anatomy_of(config: Config) -> Anatomy:
    """What the architecture of a config.json is made of.

    Raises:
        CheckpointError: the config names no architecture, one that is no causal language model of the installed
            transformers, one whose blocks can't be run one at a time, or impossible numbers.
    """
    check_config(config)
    found = cached_anatomy(config)
    if found.refusal:
        raise CheckpointError(
            f"{found.architecture} can't be calibrated: {found.refusal}",
            hint="formats that need no calibration don't ask for it",
        )
    return found


def check_config(config: Config) -> None:
    """Numbers that decide how much is built must be there, and be such as can be true. Raises CheckpointError."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError("config.json has no 'architectures'", hint="is this the config of a decoder?")
    text = text_part(config)
    for key in LAYER_KEYS:
        if key in text:
            number(text, key, MAX_BLOCKS)
    for key in _COUNTS:
        if text.get(key):
            number(text, key, MAX_EXPERTS)


def check_gradient(config: Config) -> None:
    """Raises CheckpointError: no gradient gets through the blocks, which guided statistics need."""
    found = anatomy_of(config)
    if found.no_gradient:
        raise CheckpointError(
            f"{found.architecture} gives no guided statistics: {found.no_gradient}",
            hint="leave `guided` out of the calibration: it is calibrated as well without",
        )


def block_count(config: Config) -> int:
    """How many decoder blocks the model has. Raises CheckpointError."""
    return len(anatomy_of(config).kinds)


def block_layouts(config: Config) -> Iterator[BlockLayout]:
    """The layout of each block, first to last. Raises CheckpointError."""
    found = anatomy_of(config)
    return (found.layout(index) for index in range(len(found.kinds)))


def block_layout(config: Config, index: int) -> BlockLayout:
    """What block `index` is made of. Raises CheckpointError."""
    return anatomy_of(config).layout(index)
