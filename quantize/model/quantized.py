"""A checkpoint whose weights were quantized -> the tensors that it has in 16 bits, each dequantized when it is read.

In: config.json's quantization_config and the headers. Out: a table of what there is once it is dequantized, and for
each tensor how it is read. The arithmetic is numerics/dequantize.py's. Read is what `method_of` knows: FP8 with scales
of blocks, MXFP4, bitsandbytes' 4 and 8 bits, and what compressed-tensors writes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantize.errors import CheckpointError
from quantize.files.safetensors import TensorInfo
from quantize.model.checkpoint import FLOAT_DTYPES
from quantize.system.untrusted import open_regular, parse_json

if TYPE_CHECKING:
    from torch import Tensor

FP8 = ("F8_E4M3", "F8_E5M2")
OF_CONFIG = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
STATE = ".weight.quant_state."
FOUR_BIT_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
# What stands beside weights and says how activations were quantized, or the cache: nothing of it is a weight.
ACTIVATIONS = ("input_scale", "activation_scale", "input_global_scale", "output_scale", "k_scale", "v_scale",
               "q_scale", "input_zero_point", "weight_format")  # fmt: skip
MAX_STATE_BYTES = 1 << 16
WORDS = {"I32", "I64"}

Tensors = Mapping[str, TensorInfo]
Get = Callable[[str], "Tensor"]


@dataclass(frozen=True)
class Dequantized:
    """One tensor in 16 bits. read: its values in float32 from a getter of the stored tensors; None: stored as it is."""

    dtype: str
    shape: tuple[int, ...]
    stored: str
    read: Callable[[Get], Tensor] | None = None


def method_of(config: Mapping[str, Any]) -> str | None:
    """How weights were quantized, in words, where they can be dequantized here; None otherwise."""
    settings = config.get("quantization_config") or {}
    if not isinstance(settings, Mapping):
        return None
    method, block = settings.get("quant_method"), _pair(settings.get("weight_block_size"))
    if "config_groups" in settings:
        return f"compressed-tensors {settings.get('format', '')}".strip()
    if "bnb_4bit_quant_type" in settings and _truth(settings, "load_in_4bit"):
        return f"bitsandbytes {settings['bnb_4bit_quant_type']}"
    if _truth(settings, "load_in_8bit"):
        return "bitsandbytes int8"
    if method == "fp8":
        return f"FP8 in blocks of {block[0]} x {block[1]}" if block else "FP8"
    return "MXFP4" if method == "mxfp4" else None


def only_claimed(tensors: Tensors, config: Mapping[str, Any]) -> str | None:
    """How config.json says that weights were quantized, in words, where every tensor is a plain float; else None.

    Such a folder was dequantized, or never quantized, and its config.json was not told.
    """
    plain = all(info.dtype in FLOAT_DTYPES and not _is_beside(name, tensors) for name, info in tensors.items())
    return method_of(config) if plain and tensors else None


def dequantized_table(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Dequantized]:
    """What a checkpoint holds once it is dequantized, by name, in the order of the files.

    Raises CheckpointError: a tensor without what it needs to be read.
    """
    settings = config.get("quantization_config") or {}
    block = _pair(settings.get("weight_block_size")) or _block_structure(settings)
    wide = OF_CONFIG.get(str(config.get("dtype", config.get("torch_dtype"))), "BF16")
    table: dict[str, Dequantized] = {}
    for name, info in tensors.items():
        if _is_beside(name, tensors):
            continue
        plain, found = _found(name, info, tensors, block, wide)
        table[plain] = found
    return table


def _found(
    name: str, info: TensorInfo, tensors: Tensors, block: tuple[int, int] | None, wide: str
) -> tuple[str, Dequantized]:
    """A stored tensor's name and form once it is dequantized."""
    if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in tensors:
        return _mxfp4(name, info, wide)
    if name.endswith(".weight_packed"):
        return _packed(name, info, tensors, wide)
    if info.dtype == "U8" and f"{name}.absmax" in tensors:
        return name, _four_bit(name, tensors, wide)
    if info.dtype in (*FP8, "I8"):
        return name, _scaled(name, info, tensors, block, wide)
    if info.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{info.path.name}: tensor {name!r} is {info.dtype}, and nothing beside it says how to read it",
            hint="start from the full-precision model",
        )
    return name, Dequantized(info.dtype, info.shape, name)


def _is_beside(name: str, tensors: Tensors) -> bool:
    """Whether a tensor only says how another one is read."""
    stem, _, last = name.rpartition(".")
    if last in ACTIVATIONS or STATE in name:
        return True
    if name.endswith("_scales"):
        return f"{name.removesuffix('_scales')}_blocks" in tensors
    if name.endswith("_scale_inv"):
        return name.removesuffix("_scale_inv") in tensors
    whole, part = (stem, last) if last in ("absmax", "quant_map", "nested_absmax", "nested_quant_map") else ("", "")
    if part:
        return whole in tensors
    of_weight = ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale", "SCB")
    return last in of_weight and any(f"{stem}.{item}" in tensors for item in ("weight", "weight_packed"))


def _mxfp4(name: str, info: TensorInfo, wide: str) -> tuple[str, Dequantized]:
    plain = name.removesuffix("_blocks")
    experts, out, groups, half = info.shape if len(info.shape) == 4 else _odd(name, info)

    def read(get: Get) -> Tensor:
        from quantize.numerics.dequantize import mxfp4

        return mxfp4(get(name), get(f"{plain}_scales"))

    return plain, Dequantized(wide, (experts, groups * half * 2, out), name, read)


def _scaled(name: str, info: TensorInfo, tensors: Tensors, block: tuple[int, int] | None, wide: str) -> Dequantized:
    stem = name.removesuffix("weight")
    beside = (f"{name}_scale_inv", f"{stem}weight_scale", f"{stem}SCB")
    scales = next((item for item in beside if item in tensors), None)
    if scales is None:
        raise _lacks(name, info, f"{name}_scale_inv or weight_scale")
    zeros = f"{stem}weight_zero_point"

    def read(get: Get) -> Tensor:
        from quantize.numerics.dequantize import scaled

        factor = get(scales) / 127 if scales.endswith("SCB") else get(scales)
        return scaled(get(name), factor, get(zeros) if zeros in tensors else None, block)

    return Dequantized(wide, info.shape, name, read)


def _packed(name: str, info: TensorInfo, tensors: Tensors, wide: str) -> tuple[str, Dequantized]:
    """Integers in words, or NVFP4 and MXFP4 in bytes, with the tensors that compressed-tensors puts beside them."""
    stem = name.removesuffix("weight_packed")
    scales = f"{stem}weight_scale"
    if scales not in tensors or len(info.shape) != 2:
        raise _lacks(name, info, scales)
    if info.dtype == "U8":
        whole, shape = f"{stem}weight_global_scale", (info.shape[0], info.shape[1] * 2)
        if whole not in tensors and tensors[scales].dtype == "U8":

            def read_mxfp4(get: Get) -> Tensor:
                from quantize.numerics.dequantize import mxfp4_rows

                return mxfp4_rows(get(name), get(scales))

            return f"{stem}weight", Dequantized(wide, shape, name, read_mxfp4)
        if whole not in tensors:
            raise _lacks(name, info, whole)

        def read_nvfp4(get: Get) -> Tensor:
            from quantize.numerics.dequantize import nvfp4

            return nvfp4(get(name), get(scales), get(whole))

        return f"{stem}weight", Dequantized(wide, shape, name, read_nvfp4)
    if info.dtype != "I32" or f"{stem}weight_shape" not in tensors:
        raise _lacks(name, info, f"{stem}weight_shape")
    out, width = _integers(tensors[f"{stem}weight_shape"])
    bits = next((bits for bits in (2, 4, 8) if -(-width * bits // 32) == info.shape[1]), None)
    if bits is None or out != info.shape[0]:
        raise _lacks(name, info, "words of 2, 4 or 8 bits")

    def read(get: Get) -> Tensor:
        return _unpacked(get, stem, tensors, bits, (out, width))

    return f"{stem}weight", Dequantized(wide, (out, width), name, read)


def _unpacked(get: Get, stem: str, tensors: Tensors, bits: int, shape: tuple[int, int]) -> Tensor:
    from quantize.numerics.dequantize import scaled, unpack_columns, unpack_rows

    codes, scales = unpack_columns(get(f"{stem}weight_packed"), bits, shape[1]), get(f"{stem}weight_scale")
    zeros = None
    if (name := f"{stem}weight_zero_point") in tensors:
        words = tensors[name].dtype in WORDS and tensors[name].shape[0] != shape[0]
        zeros = unpack_rows(get(name), bits, shape[0]) if words else get(name)
    if (name := f"{stem}weight_g_idx") in tensors and bool(((groups := get(name).long()) >= 0).all()):
        return scaled(codes, scales[:, groups], None if zeros is None else zeros[:, groups])
    return scaled(codes, scales, zeros)


def _four_bit(name: str, tensors: Tensors, wide: str) -> Dequantized:
    """A weight of bitsandbytes' 4 bits; the shape and what its absolute maxima are is JSON in a tensor beside it."""
    info = tensors[name]
    state_name = next((f"{name}{item}" for item in FOUR_BIT_STATES if f"{name}{item}" in tensors), None)
    if state_name is None or f"{name}.quant_map" not in tensors:
        raise _lacks(name, info, f"{name}.quant_state")
    try:
        state = parse_json(_bytes(tensors[state_name]))
        shape, block = tuple(int(size) for size in state["shape"]), int(state["blocksize"])
        nested, offset = int(state.get("nested_blocksize") or 0), float(state.get("nested_offset") or 0.0)
    except (ValueError, KeyError, TypeError) as exc:
        raise _lacks(name, info, f"{state_name} that can be read") from exc
    if -(-math.prod(shape) // 2) != info.elements or block < 1:
        raise _lacks(name, info, f"the {math.prod(shape):,} weights that {state_name} says")

    def read(get: Get) -> Tensor:
        from quantize.numerics.dequantize import four_bit, nested_absmax

        absmax = get(f"{name}.absmax")
        if nested:
            levels, factors = get(f"{name}.nested_quant_map"), get(f"{name}.nested_absmax")
            absmax = nested_absmax(absmax, levels, factors, offset, nested)
        return four_bit(get(name), absmax, get(f"{name}.quant_map"), block, shape)

    return Dequantized(wide, shape, name, read)


def _integers(info: TensorInfo) -> tuple[int, int]:
    """The two numbers of an I64 or I32 tensor."""
    raw = _bytes(info)
    size = {16: "<2q", 8: "<2i"}.get(len(raw))
    if size is None:
        raise _lacks(info.name, info, "two whole numbers")
    out, width = struct.unpack(size, raw)
    if not (0 < out < 1 << 32 and 0 < width < 1 << 32):
        raise _lacks(info.name, info, "a shape that can be true")
    return out, width


def _bytes(info: TensorInfo) -> bytes:
    if info.size_bytes > MAX_STATE_BYTES:
        raise _lacks(info.name, info, f"at most {MAX_STATE_BYTES:,} bytes")
    try:
        with open_regular(info.path) as file:
            file.seek(info.offset)
            return file.read(info.size_bytes)
    except OSError as exc:
        raise CheckpointError(f"{info.path.name}: can't be read: {exc.strerror}") from exc


def _odd(name: str, info: TensorInfo) -> tuple[int, int, int, int]:
    raise _lacks(name, info, "a shape of four numbers")


def _lacks(name: str, info: TensorInfo, what: str) -> CheckpointError:
    hint = "download the model again, or start from the full-precision one"
    return CheckpointError(f"{info.path.name}: the quantized tensor {name!r} lacks {what}", hint=hint)


def _truth(settings: Mapping[str, Any], key: str) -> bool:
    return bool(settings.get(key) or settings.get(f"_{key}"))


def schemes_of(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What compressed-tensors does with groups of modules, by a folder's quantization_config; [] of other formats."""
    groups = settings.get("config_groups")
    return [item for item in groups.values() if isinstance(item, dict)] if isinstance(groups, dict) else []


def _block_structure(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """The blocks of weights that share a scale, as compressed-tensors names them; None where there are none."""
    weights = (item.get("weights") for item in schemes_of(settings))
    found = (_pair(item.get("block_structure")) for item in weights if isinstance(item, dict))
    return next((block for block in found if block is not None), None)


def _pair(value: object) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(item, int) and item > 0 for item in value):
        return value[0], value[1]
    return None
