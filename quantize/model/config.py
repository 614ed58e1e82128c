"""Numbers in a model's config.json, which anybody may have written: whole, and of a size that can be true.

In: the config as a dictionary. Out: numbers, or CheckpointError that names the key. Which keys mean what is for shape
and architecture to know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantize.errors import CheckpointError

MAX_NUMBER = 1 << 40
TOWER_KEYS = ("vision_config", "audio_config")
DECODER = "is this the config of a decoder?"
LAYER_KEYS = (  # how many blocks; today's name first
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers", "num_blocks",
)  # fmt: skip


def number(config: Mapping[str, Any], key: str, most: int = MAX_NUMBER) -> int:
    """A number of at least one that must be there."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {key} must be a positive whole number, found {value!r}")
    if value > most:
        raise CheckpointError(f"config.json: {key} is more than {most:,}", hint=DECODER)
    return value


def optional_number(config: Mapping[str, Any], key: str) -> int | None:
    """A number that may be missing, null or 0."""
    return number(config, key) if config.get(key) else None


def number_or(config: Mapping[str, Any], key: str, default: int) -> int:
    """A number, where any that is there must be whole; 0 and null are the default too."""
    if config.get(key) is not None and not isinstance(config[key], int):
        raise CheckpointError(f"config.json: `{key}` must be a whole number", hint="check the folder's config.json")
    return first_number(config, (key,)) or default


def first_number(config: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    """Of keys that mean the same in configs of different years, the first that has a number; it may be 0."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value <= MAX_NUMBER:
                raise CheckpointError(f"config.json: impossible `{key}`", hint=DECODER)
            return value
    return None


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the decoder, where it is a part of a larger model's."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) and inner else config


def reads_more_than_text(config: Mapping[str, Any]) -> bool:
    """Whether a config describes towers for images or sound beside a decoder."""
    return text_part(config) is not config or any(isinstance(config.get(key), Mapping) for key in TOWER_KEYS)
