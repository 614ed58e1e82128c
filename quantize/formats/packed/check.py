"""A packed safetensors artifact in its real runtime: transformers loads it, another library unpacks it, it generates.

In: an artifact's folder. Out: facts, or VerifyError. Runs in a worker: gptqmodel patches other libraries on import.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from quantize.errors import VerifyError
from quantize.events import Reporter
from quantize.formats.packed.runtime import GPTQMODEL
from quantize.formats.packed.weights import open_packed
from quantize.runtimes.transformers.generate import generate_twice, read_prompt
from quantize.runtimes.transformers.load import kernels, load_causal_lm
from quantize.system.memory import give_back_freed, give_back_mapped

ROWS = 256  # of a linear that are compared at once
GIVE_BACK_AFTER = 1 << 24  # weights compared: some 64 MB of each temporary that a comparison makes


def check_packed(reporter: Reporter, folder: Path, method: str, threads: int) -> dict[str, Any]:
    """Load with transformers + gptqmodel, compare each linear with our own unpacking, generate greedily twice.

    Raises VerifyError: does not load, weights differ, logits not finite, two runs differ. MissingExtraError.
    """
    torch = GPTQMODEL.import_torch(f"loading {method.upper()} artifacts")
    torch.set_num_threads(threads)
    prompt = read_prompt(folder)  # a tokenizer takes memory while it is read: not beside the model
    started = time.perf_counter()
    model = load_causal_lm(folder)
    seconds = time.perf_counter() - started
    kernel = kernels(model)
    compared = _compare_weights(model, folder, method)
    _first_use(model, folder)
    tokens = generate_twice(model, folder, prompt)
    return {
        "runtime": "transformers + gptqmodel",
        "linears": compared,
        "tokens": tokens,
        "load_seconds": round(seconds, 2),
        "kernel": kernel,
    }


def _first_use(model: Any, folder: Path) -> None:
    """One forward pass, in which gptqmodel's kernels repack their weights: the pages of the old ones are given back."""
    import torch

    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    hooks = [layer.register_forward_hook(lambda *_: _give_back(folder)) for layers in lists for layer in layers]
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long))
    for hook in hooks:
        hook.remove()


def _give_back(folder: Path) -> None:
    give_back_freed()
    give_back_mapped(folder)


def _compare_weights(model: Any, folder: Path, method: str) -> int:
    """Each packed linear, dequantized by gptqmodel, against our own unpacking of the file's tensors."""
    compared = since = 0
    unpacked = open_packed(folder, method)
    for name, module in model.named_modules():
        theirs = _dequantized_by_gptqmodel(module)
        if theirs is None:
            continue
        ours = unpacked.dequantize(name)
        if not agree(theirs, ours):
            raise VerifyError(f"{folder.name}: {name} unpacks differently in gptqmodel", hint="a packing defect")
        compared += 1
        since += theirs.numel()
        del theirs, ours
        if since > GIVE_BACK_AFTER:
            _give_back(folder)
            since = 0
    if compared != len(unpacked.linears):
        raise VerifyError(
            f"{folder.name}: gptqmodel took {compared} linears as packed, the files have {len(unpacked.linears)}"
        )
    return compared


def agree(theirs: Any, ours: Any) -> bool:
    """Whether two float32 [out, in] are within 0.2 %, a few rows at a time: no temporaries of a linear's size."""
    if theirs.shape != ours.shape:
        return False
    pairs = zip(theirs.split(ROWS), ours.split(ROWS), strict=True)
    return all(bool(((left - right).abs_() <= right.abs().mul_(2e-3).add_(1e-6)).all()) for left, right in pairs)


def _dequantized_by_gptqmodel(module: Any) -> Any:
    """float32 [out, in] as gptqmodel unpacks it; None if the module is no packed linear."""
    import torch

    if hasattr(module, "awq_weight_dequantize"):
        return module.awq_weight_dequantize("cpu", torch.float32).T
    if hasattr(module, "dequantize_weight"):
        return module.dequantize_weight().float().T
    return None
