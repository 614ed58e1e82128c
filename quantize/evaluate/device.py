"""Which device a model is measured on: the one that was asked for where it fits, else the CPU, said.

In: a model, the device that is wanted, the context. Out: a DevicePlace, and what a function makes of it; where the card
runs out of memory all the same, once more on the CPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from quantize.errors import CheckpointError, RefusedError, first_line, is_out_of_memory
from quantize.estimate.fit import Workload
from quantize.estimate.placing import place_on_gpu
from quantize.estimate.vram import EstimateSettings
from quantize.events import Reporter, status, warn
from quantize.formats import find_format, runtime_kind
from quantize.runtimes.base import ModelRef
from quantize.runtimes.devices import CPU, ON_CPU, DevicePlace, choose
from quantize.system.sizes import memory_text

Result = TypeVar("Result")


@dataclass(frozen=True)
class ModelRun:
    """A model to run, the device that is wanted (a word as in runtimes/devices.py), and tokens of the longest text."""

    model: ModelRef
    device: str
    context: int


def on_device(reporter: Reporter, wanted: ModelRun, run: Callable[[DevicePlace], Result]) -> Result:
    """What `run` gives at the place that is found. Raises what it raises, and UsageError: no name of a device."""
    place = find_place(reporter, wanted)
    try:
        return run(place)
    except Exception as exc:
        if place == ON_CPU or not is_out_of_memory(exc):
            raise
        why = first_line(exc)
    gc.collect()  # what the failed one held is in frames of the error
    warn(reporter, "", f"the {wanted.model.format} model is run on the CPU: {place.device} is out of memory ({why})")
    return run(ON_CPU)


def find_place(reporter: Reporter, wanted: ModelRun) -> DevicePlace:
    """By estimate on the memory that is free now; what is not as wanted is said. Raises UsageError: no such name."""
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
