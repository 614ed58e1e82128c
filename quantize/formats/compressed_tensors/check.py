"""A compressed-tensors artifact in its real runtime: the library unpacks it, transformers loads it, it generates.

In: an artifact's folder. Out: facts, or VerifyError. Runs in a worker.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from quantize.errors import NotReadWholeError, VerifyError
from quantize.events import Reporter
from quantize.files.safetensors import read_tensor
from quantize.formats.compressed_tensors.runtime import COMPRESSED_TENSORS
from quantize.formats.compressed_tensors.schemes import MXFP4, NVFP4
from quantize.formats.compressed_tensors.weights import CompressedWeights, quantized_linears
from quantize.formats.nothing_lost import account
from quantize.formats.packed.check import agree
from quantize.model.checkpoint import Checkpoint, read_json, tensor_table
from quantize.runtimes.base import ModelRef
from quantize.runtimes.devices import CPU
from quantize.runtimes.transformers.generate import generate_twice, read_prompt
from quantize.system.memory import give_back_freed

METHOD = "compressed-tensors"
# Relative; the library multiplies FP4 in bfloat16. A step of E2M1 is 14 % and more.
IN_FLOAT32, IN_BFLOAT16 = 2e-3, 2**-6


def check_compressed(
    reporter: Reporter, folder: Path, threads: int, source: Checkpoint, device: str = CPU
) -> dict[str, Any]:
    """Find each tensor of the source again, compare each linear as the library decompresses it with our own reading,
    load with transformers on the device and generate greedily twice.

    Raises VerifyError: a tensor is lost, does not load, weights differ, logits not finite, two runs differ.
    MissingExtraError.
    """
    torch = COMPRESSED_TENSORS.import_torch("loading compressed-tensors artifacts")
    torch.set_num_threads(threads)
    tensors = _accounted(folder, source)
    compared = compare_decompressed(folder, source)
    facts = {"linears": compared, "tensors": tensors}
    prompt = read_prompt(folder)
    started = time.perf_counter()
    try:
        model = COMPRESSED_TENSORS.load(ModelRef(folder, METHOD), device).model
    except NotReadWholeError as exc:
        return {"runtime": f"compressed-tensors alone: {exc.message}", **facts}
    seconds = round(time.perf_counter() - started, 2)
    tokens = generate_twice(model, folder, prompt)
    return {"runtime": "transformers + compressed-tensors", **facts, "tokens": tokens, "load_seconds": seconds}


def _accounted(folder: Path, source: Checkpoint) -> dict[str, Any]:
    """As it is without folds; else with AWQ's, which change what blocks keep in high precision."""
    try:
        return account(folder, source)
    except VerifyError:
        return account(folder, source, folds=True)


def compare_decompressed(folder: Path, source: Checkpoint) -> int:
    """Each quantized linear, decompressed by the library's own code, against our own reading of the file's tensors.

    Raises VerifyError: they differ.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    settings = read_json(folder / "config.json")["quantization_config"]
    config = QuantizationConfig.model_validate(settings)
    compressor = BaseCompressor.get_value_from_registry(config.format)
    (scheme,) = config.config_groups.values()
    stored, read = tensor_table(folder), CompressedWeights().reader(folder, source)
    tolerance = IN_BFLOAT16 if config.format in (NVFP4, MXFP4) else IN_FLOAT32
    names = quantized_linears(folder)
    for name in names:
        stem = name.removesuffix("weight")
        state = {part.removeprefix(stem): read_tensor(stored[part]) for part in _parts(stem, stored)}
        state["weight_scale"] = _wide(state["weight_scale"])
        theirs = compressor.decompress(state, scheme)["weight"].float()
        ours = read(name, theirs)
        if ours is None or not agree(theirs, ours, tolerance):
            what = f"{folder.name}: {name} unpacks differently in compressed-tensors"
            raise VerifyError(what, hint="a packing defect")
        give_back_freed()
    return len(names)


def _parts(stem: str, stored: Any) -> list[str]:
    """The tensors of one linear."""
    ends = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale")
    return [stem + end for end in ends if stem + end in stored]


def _wide(scales: Any) -> Any:
    """Scales of 16 bits in float32, so that the library computes in float32; those of 8 bits as they are."""
    return scales.float() if scales.itemsize == 2 else scales
