"""Does it fit, before it is loaded: the estimate against the memory that is free now.

In: a target, how it is to be run, this machine. Out: a Placement (device, context), or RefusedError with the numbers
and what would fit. The arithmetic is vram.py's, the verdict fit.py's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from quantize.errors import RefusedError, UsageError
from quantize.estimate.fit import Fit, FitWord, Workload, advise
from quantize.estimate.vram import EstimateSettings, VramProfile
from quantize.formats import find_format, known_format
from quantize.runtimes.base import ModelRef, runtime_version
from quantize.runtimes.served import Serving
from quantize.serve.engines.base import EngineTarget
from quantize.serve.targets import LocalTarget
from quantize.store.store import Store
from quantize.system.machine import Machine
from quantize.system.sizes import GIB

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class Placement:
    """Where a model goes, with how much context for each of its sequences, and what was estimated."""

    device: str
    context: int
    verdict: Fit


def place(target: LocalTarget, wanted: Serving, machine: Machine, store: Store, *, force: bool = False) -> Placement:
    """Decide, and refuse what does not fit unless it is forced.

    Raises UsageError: no such device, or more context than the model has.
    """
    device = _device(wanted.device, machine)
    if wanted.context > target.shape.max_context:
        message = f"{target.name}: {wanted.context} tokens are more than its context of {target.shape.max_context}"
        raise UsageError(message, hint=f"use --context {target.shape.max_context} or less")
    context = wanted.context or min(DEFAULT_CONTEXT, target.shape.max_context)
    on_gpu = device != "cpu"
    settings = EstimateSettings(target.kind.memory, device="gpu" if on_gpu else "cpu", flash_attention=False)
    weights = target.weights_bytes + (0 if on_gpu else target.repacked_bytes)
    workload = Workload(target.shape, weights, find_format(target.format).vram, settings, context, wanted.slots)
    free, what = _free(device, machine)
    verdict = advise(workload, free, _siblings(target, store))
    if verdict.word is FitWord.DOES_NOT_FIT and not force:
        tries = "; ".join(verdict.suggestions)
        message = f"{target.name} does not fit: {verdict.reason}, which is what is free {what}"
        raise RefusedError(message, hint=f"what would fit: {tries}; or load it all the same with --force")
    return Placement(device, context, verdict)


def _device(wanted: str, machine: Machine) -> str:
    if wanted == "auto":
        return "cuda:0" if machine.gpus else "cpu"
    if wanted == "cpu":
        return wanted
    kind, _, number = wanted.partition(":")
    if kind != "cuda" or not (number or "0").isdigit():
        raise UsageError(f"{wanted!r} is no device", hint="use auto, cpu or cuda:0")
    if int(number or 0) >= len(machine.gpus):
        found = ", ".join(gpu.name for gpu in machine.gpus) or "none"
        raise UsageError(f"there is no {wanted} here (GPUs: {found})", hint="use --device cpu")
    return f"cuda:{int(number or 0)}"


def _free(device: str, machine: Machine) -> tuple[int, str]:
    if device == "cpu":
        return machine.available_ram_bytes, f"of {machine.ram_bytes / GIB:.1f} GiB RAM"
    gpu = machine.gpus[int(device.partition(":")[2])]
    return gpu.vram_bytes - gpu.used_bytes, f"on the {gpu.name} of {gpu.vram_bytes / GIB:.1f} GiB"


def _siblings(target: LocalTarget, store: Store) -> dict[str, tuple[int, VramProfile]]:
    """Other current builds of the same model: name -> (bytes, profile)."""
    if target.artifact is None:
        return {}
    own = target.artifact.manifest
    return {
        f"{item.manifest.name}/{item.manifest.variant}": (
            item.manifest.weights_bytes,
            known_format(item.manifest.format).vram,
        )
        for item in store.artifacts()
        if item.manifest.name == own.name and item.manifest.variant != own.variant and store.is_current(item)
    }


def engine_target(target: LocalTarget, wanted: Serving, placement: Placement) -> EngineTarget:
    """What the model's process is told. Raises MissingExtraError: the target's runtime is not installed."""
    named = wanted.device != "auto"
    serving = replace(wanted, context=placement.context, device=placement.device, named=named)
    path = Path(os.path.abspath(target.path))  # parts of a model are found by their names: no link is followed
    model = ModelRef(path.parent, target.format, path.name) if path.is_file() else ModelRef(path, target.format)
    return EngineTarget(target.name, target.kind, model, serving, runtime_name(target))


def runtime_name(target: LocalTarget) -> str:
    """What a target runs in, with the version installed here. Raises MissingExtraError: it is not."""
    kind = target.kind
    return f"{kind.name} ({runtime_version(kind, f'serving {target.format}')})"
