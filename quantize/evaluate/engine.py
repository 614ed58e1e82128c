"""What a model is measured in: its real runtime where it fits in memory, else transformers' layers, block by block.

In: a model, the checkpoint that it was made from, the memory that is free. Out: what it takes whole, whether it can be
streamed, and what a record calls the engine. Only light imports; streamed.py does the work. A GGUF file is never
streamed: llama.cpp maps it, and the system drops mapped pages whose memory it needs otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from quantize.errors import CheckpointError, MissingExtraError, RefusedError
from quantize.estimate.fit import usable_bytes
from quantize.estimate.vram import RUNTIMES, EstimateSettings, estimate
from quantize.formats import find_format, runtime_kind
from quantize.model.architecture import anatomy_of
from quantize.model.checkpoint import FLOAT_DTYPES, read_json, tensor_table
from quantize.recipe.evaluation import Engine
from quantize.runtimes.base import ModelRef, block_rows, runtime_version
from quantize.runtimes.devices import CPU, ON_CPU, DevicePlace
from quantize.system.machine import ram
from quantize.system.sizes import memory_text

STREAMED = "streamed blocks"
STREAMED_ON_CPU = DevicePlace(CPU, streamed=True)
LIBRARY = "transformers"  # whose folders can be streamed, as Layout.library names it
READING_COPIES = 4  # of a block of log-probabilities, while they are made and compared


@dataclass(frozen=True)
class Memory:
    """What a model takes whole in its runtime on the CPU, and what is free, in bytes."""

    need_bytes: int
    free_bytes: int

    @property
    def is_enough(self) -> bool:
        """Whether it fits what may be planned with."""
        return self.need_bytes <= usable_bytes(self.free_bytes)

    def __str__(self) -> str:
        return f"whole it takes {memory_text(self.need_bytes)}, and {memory_text(self.free_bytes)} are free"


def why_not_streamed(model: ModelRef, source: Path) -> str:
    """Why a model can't be read block by block; "" where it can.

    source: folder of the checkpoint that it is, or was made from.
    """
    found = find_format(model.format)
    if found.layout.library != LIBRARY:
        return f"{model.format} files are read by {runtime_kind(model.format).name} alone"
    if found.weights is None and model.folder != source:
        return f"{model.format} does not show its weights"
    try:
        anatomy_of(read_json(source / "config.json"))
    except CheckpointError as exc:
        return exc.message
    return ""


def memory_on_cpu(model: ModelRef, context: int) -> Memory | None:
    """What its headers say that it takes at a context, whole; None where nothing is known to estimate by."""
    found, kind = find_format(model.format), runtime_kind(model.format)
    if kind.memory not in RUNTIMES:
        return None
    try:
        disk = found.layout.measure(model.path)
        weights = _weights_bytes(model, disk.weights_bytes)
    except (CheckpointError, RefusedError):
        return None
    settings = EstimateSettings(kind.memory, device=CPU, flash_attention=False)
    whole = estimate(disk.shape, weights, profile=found.vram, settings=settings, context=context)
    rows = min(context, block_rows(disk.shape.vocab_size))
    return Memory(whole.expected_bytes + READING_COPIES * 4 * rows * disk.shape.vocab_size, ram()[1])


def engine_tools(model: ModelRef, place: DevicePlace) -> dict[str, str]:
    """What figures of a model depend on beside its weights, for the key of what is kept of it.

    Raises MissingExtraError: its runtime is not installed.
    """
    if place.streamed:
        return {"name": STREAMED, "version": streamed_version(), "device": place.kind, "dtype": "float32"}
    kind = runtime_kind(model.format)
    known = runtime_version(kind, f"evaluating a {model.format} model")
    return {"name": kind.name, "version": known, "device": place.kind, "dtype": kind.computes_in(place)}


def streamed_version() -> str:
    """The libraries that compute blocks, with versions. Raises MissingExtraError: they are not installed."""
    try:
        return ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    except PackageNotFoundError as exc:
        raise MissingExtraError("evaluating a model block by block", "torch") from exc


def is_streamed(engine: Engine, memory: Memory | None) -> bool:
    """Whether a model that can be streamed is. memory: None is taken to be enough."""
    return engine == "streamed" or (engine == "auto" and memory is not None and not memory.is_enough)


def _weights_bytes(model: ModelRef, stored: int) -> int:
    """Of the weights in memory: floating ones grow where the runtime computes in float32."""
    if find_format(model.format).layout.library != LIBRARY or runtime_kind(model.format).computes_in(ON_CPU) == "auto":
        return stored
    table = tensor_table(model.folder).values()
    return sum(4 * item.elements if item.dtype in FLOAT_DTYPES else item.size_bytes for item in table)
