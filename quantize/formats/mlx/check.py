"""An MLX artifact in its real runtime: mlx unpacks it, mlx-lm loads it, it generates.

In: an artifact's folder. Out: facts, or VerifyError. Runs in a worker.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.errors import VerifyError
from quantize.events import Reporter
from quantize.files.safetensors import TensorInfo
from quantize.formats.mlx.weights import dequantize, quantization, quantized_linears
from quantize.formats.nothing_lost import account
from quantize.formats.packed.check import agree
from quantize.model.checkpoint import Checkpoint, tensor_table
from quantize.runtimes.mlx.load import check_installed, load, to_torch
from quantize.runtimes.transformers.generate import read_prompt
from quantize.system.memory import give_back_freed

NEW_TOKENS = 8
PARTS = ("weight", "scales", "biases")
ROUNDING = 2**-6  # relative: mlx gives FP4 in bfloat16


def check_mlx(reporter: Reporter, folder: Path, threads: int, source: Checkpoint) -> dict[str, Any]:
    """Find each tensor of the source again, compare each linear as mlx dequantizes it with our own reading, load with
    mlx-lm and generate greedily twice. Raises VerifyError, MissingExtraError.
    """
    check_installed("loading MLX artifacts")
    from quantize.runtimes.mlx.runtime import answer_greedily

    tensors, compared = account(folder, source), compare_dequantized(folder)
    prompt = read_prompt(folder).flatten().tolist()
    started = time.perf_counter()
    model = load(folder)
    seconds = round(time.perf_counter() - started, 2)
    first, second = (answer_greedily(model, prompt, NEW_TOKENS) for _ in range(2))
    if first != second:
        raise VerifyError(f"{folder.name}: greedy generation gives {first}, then {second}")
    return {"runtime": "mlx-lm", "linears": compared, "tensors": tensors, "tokens": first, "load_seconds": seconds}


def compare_dequantized(folder: Path) -> int:
    """Each quantized linear, dequantized by mlx, against our own reading of the file's tensors.

    Raises VerifyError: they differ.
    """
    import mlx.core as mx

    table, settings = tensor_table(folder), quantization(folder)
    stored: dict[Path, Any] = {path: mx.load(str(path)) for path in sorted({info.path for info in table.values()})}
    linears = quantized_linears(table)
    mode = settings.get("mode", "affine")
    for linear in linears:
        words, scales, biases = (_stored(table, stored, f"{linear}.{part}") for part in PARTS)
        if mode == "affine":  # in float32, so that no sum is rounded
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        theirs = to_torch(mx.dequantize(words, scales, biases, settings["group_size"], settings["bits"], mode))
        ours = dequantize(table, f"{linear}.", settings)
        if not agree(theirs, ours, ROUNDING):
            raise VerifyError(f"{folder.name}: {linear} unpacks differently in mlx", hint="a packing defect")
        give_back_freed()
    return len(linears)


def _stored(table: Mapping[str, TensorInfo], stored: Mapping[Path, Any], name: str) -> Any:
    """One tensor as mlx reads it; None where there is none."""
    return stored[table[name].path][name] if name in table else None
