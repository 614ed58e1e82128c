"""bitsandbytes in a worker: quantize a checkpoint tensor by tensor, and try an artifact out in transformers.

In: a checkpoint and the table of what to write. Out: shards. The rounding is numerics/int8.py's and numerics/nf4.py's.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import MissingExtraError
from quantize.events import Reporter
from quantize.files.shards import Table, torch_dtype
from quantize.formats.folder_build import DTYPE_NAMES
from quantize.formats.nothing_lost import account
from quantize.formats.one_by_one import write_one_by_one
from quantize.model.checkpoint import Checkpoint
from quantize.numerics.constants import NF4_BLOCK
from quantize.runtimes.devices import CPU
from quantize.system.processor import device_name

if TYPE_CHECKING:
    import torch



def write_quantized(
    reporter: Reporter, checkpoint: Checkpoint, staging: Path, scratch: Path, table: Table, packed: frozenset[str],
    kind: str, variant: str,
) -> tuple[tuple[str, ...], str]:  # fmt: skip
    """Write every tensor of `table` in order; the linears in `packed` become INT8 or NF4.

    Returns the file names, and the kind of processor that the rounding was computed on.
    """
    check_installed()

    def tensors_of(name: str) -> dict[str, torch.Tensor]:
        return _tensors_of(checkpoint, _source_of(name, checkpoint, packed), table, packed, kind)

    files = write_one_by_one(reporter, staging, scratch, table, tensors_of, f"quantizing to {kind}", variant)
    return files, device_name("cpu")


def check_loaded(
    reporter: Reporter, folder: Path, threads: int, source: Checkpoint, device: str = CPU
) -> dict[str, Any]:
    """Find each tensor of the source again, load with transformers + bitsandbytes on the device and generate greedily
    twice. Raises VerifyError.
    """
    check_installed()
    import torch

    from quantize.runtimes.transformers.generate import generate_twice, read_prompt
    from quantize.runtimes.transformers.load import load_causal_lm

    torch.set_num_threads(threads)
    tensors = account(folder, source)
    started = time.perf_counter()
    model = load_causal_lm(folder, device)
    seconds = round(time.perf_counter() - started, 2)
    tokens = generate_twice(model, folder, read_prompt(folder))
    return {"runtime": "transformers + bitsandbytes", "tokens": tokens, "tensors": tensors, "load_seconds": seconds}


def stored_type(checkpoint: Checkpoint) -> str:
    """What is not quantized stays in the source's type; BF16 in place of an FP16 that is too narrow for the model."""
    return checkpoint.half if checkpoint.dtype == "F16" else checkpoint.dtype


def nf4_state(dtype: str, shape: tuple[int, int]) -> bytes:
    """What bitsandbytes stores beside an NF4 weight about how to read it, as JSON bytes."""
    size = f"[{shape[0]}, {shape[1]}]"
    text = f'{{"quant_type": "nf4", "blocksize": {NF4_BLOCK}, "dtype": "{DTYPE_NAMES[dtype]}", "shape": {size}}}'
    return text.encode()


def _source_of(name: str, checkpoint: Checkpoint, packed: frozenset[str]) -> str:
    """The source tensor that an output tensor is made of."""
    if name in checkpoint.tensors:
        return name
    stem = name.partition(".weight.")[0] if ".weight." in name else name.rpartition(".")[0]
    return f"{stem}.weight"


def _tensors_of(
    checkpoint: Checkpoint, source: str, table: Table, packed: frozenset[str], kind: str
) -> dict[str, torch.Tensor]:
    weight = checkpoint.read(source)
    if source not in packed:  # as transformers casts what it loads: norms in F32 beside BF16 matrices are BF16 too
        return {source: weight.to(torch_dtype(table[source][0]))}
    prefix = source.removesuffix("weight")
    if kind == "int8":
        from quantize.numerics.int8 import quantize_int8

        rows = quantize_int8(weight)
        import torch

        return {
            f"{prefix}SCB": rows.scales,
            f"{prefix}weight": rows.codes,
            f"{prefix}weight_format": torch.zeros((), dtype=torch.uint8),
        }
    from quantize.numerics.nf4 import quantize_nf4

    blocks = quantize_nf4(weight)
    return {
        source: blocks.words,
        f"{source}.absmax": blocks.absmax,
        f"{source}.quant_map": blocks.levels,
        f"{source}.quant_state.bitsandbytes__nf4": _state(checkpoint, weight),
    }


def _state(checkpoint: Checkpoint, weight: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.tensor(list(nf4_state(stored_type(checkpoint), (weight.shape[0], weight.shape[1]))), dtype=torch.uint8)


def check_installed() -> None:
    """Raises MissingExtraError: bitsandbytes is not there."""
    try:
        import bitsandbytes  # noqa: F401 - only to say plainly that it is missing
    except ImportError as exc:
        raise MissingExtraError("the bitsandbytes format", "bnb") from exc
