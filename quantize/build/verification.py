"""A finished artifact is verified on the device that its builder is told: a GPU that has room for it, else the CPU.

In: an artifact's folder, its source, how to run. Out: the facts of its builder's `verify`, and `device` where that is a
GPU. On a GPU it is the kernels that users run that must compute what the files say. What is verified is the builder's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantize.errors import QuantizeError, first_line, is_out_of_memory
from quantize.evaluate.device import ModelRun, find_place
from quantize.events import Reporter, warn
from quantize.formats import find_format
from quantize.formats.base import Builder, RunLimits
from quantize.model.checkpoint import Checkpoint
from quantize.runtimes.base import ModelRef
from quantize.runtimes.devices import CPU, ON_CPU, DevicePlace
from quantize.system.process import run_step

CONTEXT = 256  # tokens: no verification reads more


@dataclass(frozen=True)
class Verification:
    """One artifact to verify, with the builder of its format, called by the format's name."""

    format: str
    builder: Builder[Any]
    folder: Path
    checkpoint: Checkpoint


def verify(asked: Verification, limits: RunLimits, reporter: Reporter) -> dict[str, Any]:
    """What the builder finds out. limits: their device is the one that is wanted, by its name or `auto`.

    Out of the GPU's memory it is once more on the CPU, said. Raises VerifyError, and UsageError: no name of a device.
    """
    place = _place(asked, limits, reporter)
    try:
        return _facts(asked, limits, reporter, place)
    except QuantizeError as exc:
        if place.device == CPU or not is_out_of_memory(exc):
            raise
        why = first_line(exc)
    warn(reporter, "", f"the {asked.format} artifact is verified on the CPU: {place.device} is out of memory ({why})")
    return _facts(asked, limits, reporter, ON_CPU)


def _place(asked: Verification, limits: RunLimits, reporter: Reporter) -> DevicePlace:
    """Where it has room; the runtime is asked in a process of its own, which takes no memory of a GPU afterwards."""
    found = find_format(asked.format)
    if not limits.on_own_gpu or found.runtime is None:
        return ON_CPU
    main = found.layout.main_file(asked.folder)
    model = ModelRef(asked.folder, asked.format, main.name if main is not None else None)
    wanted = ModelRun(model, limits.device, CONTEXT, engine="runtime")
    return run_step("looking for a GPU", reporter, find_place, wanted)


def _facts(asked: Verification, limits: RunLimits, reporter: Reporter, place: DevicePlace) -> dict[str, Any]:
    there = replace(limits, device=place.device, place=place)
    facts: Mapping[str, Any] = asked.builder.verify(asked.folder, asked.checkpoint, there, reporter)
    return {**facts} if place.device == CPU else {**facts, "device": place.device}
