"""The schemes: what weights and activations become, in which layout, on which GPUs. Data; nothing is computed here.

The names are compressed-tensors' own (its quantization/quant_scheme.py), and so are the words in config.json.
Compute capabilities: those from which vLLM 0.32 multiplies in the scheme (get_min_capability of its own schemes, in
model_executor/layers/quantization/compressed_tensors/schemes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Name = Literal["W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16"]
GROUPED = ("W4A16", "W4A16_ASYM", "W8A16")
FP8_BLOCK_SIZE = 128
PACKED, INTEGERS, FLOATS = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
LEAST = "7.5"  # compute capability of the oldest GPUs that any scheme runs on


@dataclass(frozen=True)
class Scheme:
    """One scheme. layout: how weights are stored, as config.json calls it. weights, inputs: its quantization
    arguments; a group size of 0 is filled in. calibrated: weights are solved against Gram matrices; others are
    rounded to nearest. capability: the least CUDA compute capability. on_older: what an older GPU does, a phrase; ""
    where it does not run it.
    """

    bits: int
    layout: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None = None
    calibrated: bool = True
    capability: str = LEAST
    on_older: str = ""

    @property
    def symmetric(self) -> bool:
        """Whether codes have no zero point."""
        return bool(self.weights["symmetric"])


def _arguments(bits: int, kind: str, strategy: str, *, dynamic: bool = False, **more: Any) -> dict[str, Any]:
    known = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": dynamic}
    return known | {"group_size": None} | more


def _grouped(bits: int, *, symmetric: bool = True) -> dict[str, Any]:
    return _arguments(bits, "int", "group", group_size=0, symmetric=symmetric)


_MARLIN = "older ones, from 7.5 on, multiply in 16 bits: as small, but no faster"
SCHEMES: Mapping[str, Scheme] = {
    "W4A16": Scheme(4, PACKED, _grouped(4)),
    "W4A16_ASYM": Scheme(4, PACKED, _grouped(4, symmetric=False)),
    "W8A16": Scheme(8, PACKED, _grouped(8)),
    "W8A8": Scheme(8, INTEGERS, _arguments(8, "int", "channel"), _arguments(8, "int", "token", dynamic=True)),
    "FP8_DYNAMIC": Scheme(
        8, FLOATS, _arguments(8, "float", "channel"), _arguments(8, "float", "token", dynamic=True),
        calibrated=False, capability="8.9", on_older=_MARLIN,
    ),
    "FP8_BLOCK": Scheme(
        8, FLOATS, _arguments(8, "float", "block", block_structure=[FP8_BLOCK_SIZE, FP8_BLOCK_SIZE]),
        _arguments(8, "float", "group", dynamic=True, group_size=FP8_BLOCK_SIZE),
        calibrated=False, capability="8.9", on_older=_MARLIN,
    ),
    "NVFP4A16": Scheme(
        4, NVFP4, _arguments(4, "float", "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
    ),
    "MXFP4A16": Scheme(
        4, MXFP4, _arguments(4, "float", "group", group_size=32, scale_dtype="torch.uint8"), capability="8.0"
    ),
}  # fmt: skip


def config_groups(name: str, group_size: int | None) -> dict[str, Any]:
    """`config_groups` of config.json. group_size: of schemes in GROUPED."""
    scheme = SCHEMES[name]
    weights = dict(scheme.weights)
    if weights["group_size"] == 0:
        weights["group_size"] = group_size
    inputs = None if scheme.inputs is None else dict(scheme.inputs)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {"group_0": group | {"format": scheme.layout}}
