"""Which device a model is measured on: the one that was asked for where it fits, else the CPU, said.

In: a model, the device that is wanted, the context. Out: a DevicePlace, and what a function makes of it; where the card
runs out of memory all the same, once more on the CPU. What does not fit the CPU's memory either is streamed there, if
engine.py knows of nothing against it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from quantize.errors import CheckpointError, RefusedError, first_line, is_out_of_memory
from quantize.estimate.fit import Workload
from quantize.estimate.placing import place_on_gpu
from quantize.estimate.vram import EstimateSettings
from quantize.evaluate.engine import STREAMED_ON_CPU, is_streamed, memory_on_cpu, why_not_streamed
from quantize.events import Reporter, note, status, warn
from quantize.formats import find_format, runtime_kind
from quantize.recipe.evaluation import Engine
from quantize.runtimes.base import ModelRef
from quantize.runtimes.devices import CPU, ON_CPU, DevicePlace, choose
from quantize.system.sizes import memory_text

Result = TypeVar("Result")


@dataclass(frozen=True)
class ModelRun:
    """A model to run, the device that is wanted (a word as in runtimes/devices.py), and tokens of the longest text.

    source: folder of the checkpoint that it is, or was made from; without it, it is not streamed.
    """

    model: ModelRef
    device: str
    context: int
    source: Path | None = None
    engine: Engine = "auto"


def on_device(reporter: Reporter, wanted: ModelRun, run: Callable[[DevicePlace], Result]) -> Result:
    """What `run` gives at the place that is found. Raises what it raises, and UsageError: no name of a device."""
    place = find_place(reporter, wanted)
    try:
        return run(place)
    except Exception as exc:
        if place.device == CPU or not is_out_of_memory(exc):
            raise
        why = first_line(exc)
    gc.collect()  # what the failed one held is in frames of the error
    warn(reporter, "", f"the {wanted.model.format} model is run on the CPU: {place.device} is out of memory ({why})")
    return run(_in_memory(reporter, wanted))


def find_place(reporter: Reporter, wanted: ModelRun) -> DevicePlace:
    """By estimate on the memory that is free now; what is not as wanted is said. Raises UsageError: no such name."""
    place = ON_CPU if wanted.engine == "streamed" else _whole(reporter, wanted)
    return _in_memory(reporter, wanted) if place == ON_CPU else place


def _in_memory(reporter: Reporter, wanted: ModelRun) -> DevicePlace:
    """On the CPU: whole where it fits, else block by block."""
    model, source = wanted.model, wanted.source
    memory = memory_on_cpu(model, wanted.context) if wanted.engine == "auto" else None
    if source is None or not is_streamed(wanted.engine, memory):
        return ON_CPU
    why_not = why_not_streamed(model, source)
    if not why_not:
        why = f": {memory}" if memory is not None else ", as its recipe asks"
        note(reporter, "", f"the {model.format} model is read block by block on the CPU{why}")
        return STREAMED_ON_CPU
    if memory is not None:
        warn(reporter, "", f"the {model.format} model may not fit in memory: {memory}; not block by block: {why_not}")
    else:
        note(reporter, "", f"the {model.format} model is not read block by block: {why_not}")
    return ON_CPU


def _whole(reporter: Reporter, wanted: ModelRun) -> DevicePlace:
    if wanted.device == CPU:
        return ON_CPU
    kind = runtime_kind(wanted.model.format)
    gpus = kind.find_gpus()
    try:
        meant = choose(wanted.device, gpus)
    except LookupError:
        why = f"{kind.name} has no {wanted.device} here (GPUs: {', '.join(gpu.device for gpu in gpus) or 'none'})"
        warn(reporter, "", f"the {wanted.model.format} model is run on the CPU: {why}; `quantize doctor` says more")
        return ON_CPU
    if meant is None:
        return ON_CPU
    workload = _workload(wanted, kind.memory)
    if workload is None:  # nothing to estimate by: it is tried
        return DevicePlace(meant.device)
    placing = place_on_gpu(workload, gpus, meant, splits=kind.splits)
    if placing is None:
        need, free = memory_text(workload.estimate().expected_bytes), memory_text(meant.free_bytes)
        why = f"it takes {need}, and {free} are free on {meant.device} ({meant.name})"
        warn(reporter, "", f"the {wanted.model.format} model is run on the CPU: {why}")
        return ON_CPU
    if placing.note:
        status(reporter, "", f"the {wanted.model.format} model: {placing.note}")
    return placing.place


def _workload(wanted: ModelRun, runtime: str) -> Workload | None:
    found = find_format(wanted.model.format)
    try:
        disk = found.layout.measure(wanted.model.path)
    except (CheckpointError, RefusedError):
        return None
    settings = EstimateSettings(runtime, flash_attention=False)
    return Workload(disk.shape, disk.weights_bytes, found.vram, settings, wanted.context, 1)
