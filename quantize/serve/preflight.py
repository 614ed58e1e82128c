"""Does it fit, before it is loaded: the estimate against the memory that is free now.

In: a target, how it is to be run, this machine, the GPUs that the target's runtime can use. Out: a Placement (device,
context), or RefusedError with the numbers and what would fit. The arithmetic is vram.py's, the verdict fit.py's, what
goes where placing.py's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quantize.errors import RefusedError, UsageError
from quantize.estimate.fit import Fit, FitWord, Workload, advise, judge
from quantize.estimate.placing import Placing, layers_that_fit, place_on_gpu
from quantize.estimate.vram import EstimateSettings, VramProfile
from quantize.formats import find_format, known_format
from quantize.runtimes.base import ModelRef, RuntimeKind, runtime_version
from quantize.runtimes.devices import AUTO, CPU, ON_CPU, Accelerator, DevicePlace, check_name, choose
from quantize.runtimes.served import KV_BITS, Serving
from quantize.serve.engines.base import EngineTarget
from quantize.serve.targets import LocalTarget
from quantize.store.store import Store
from quantize.system.machine import Machine
from quantize.system.sizes import GIB, memory_text

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class Placement:
    """Where a model goes, with how much context for each of its sequences, and what was estimated.

    note: what of it is not the whole on a GPU that is there.
    """

    where: DevicePlace
    context: int
    verdict: Fit
    note: str = ""


def place(
    target: LocalTarget, wanted: Serving, machine: Machine, gpus: Sequence[Accelerator], store: Store, *,
    force: bool = False,
) -> Placement:  # fmt: skip
    """Decide, and refuse what does not fit unless it is forced. gpus: that the target's runtime can use.

    A GPU that is named takes all of a model, or it is refused. `auto` takes what fits, of a runtime that splits, else
    the CPU. Raises UsageError: no such device, or more context than the model has.
    """
    if wanted.kv_bits not in target.kind.kv_bits:
        message = f"{target.name}: {target.kind.name} keeps its KV cache in 16 bits, not in {wanted.kv_bits}"
        raise UsageError(message, hint="leave out --kv-bits, or serve a GGUF variant")
    if wanted.context > target.shape.max_context:
        message = f"{target.name}: {wanted.context} tokens are more than its context of {target.shape.max_context}"
        raise UsageError(message, hint=f"use --context {target.shape.max_context} or less")
    context = wanted.context or min(DEFAULT_CONTEXT, target.shape.max_context)
    gpu = _gpu(target.kind, wanted.device, machine, gpus)
    workload = _workload(target, wanted, context, on_gpu=gpu is not None)
    if gpu is None:
        free, what = machine.available_ram_bytes, f"of {machine.ram_bytes / GIB:.1f} GiB RAM"
        fit = _checked(target, workload, free, what, store, force=force)
        return Placement(ON_CPU, context, fit, _unused(target.kind, wanted.device, machine))
    splits = target.kind.splits and wanted.device == AUTO and not force
    placing = place_on_gpu(workload, gpus, gpu, splits=splits)
    if placing is not None and _rest_bytes(workload, placing) <= machine.available_ram_bytes:
        fit = advise(workload, gpu.free_bytes) if not placing.note else placing.fit
        return Placement(placing.place, context, fit, placing.note)
    if wanted.device == AUTO and workload.gpu_layers is None and not force:
        fit = judge(_workload(target, wanted, context, on_gpu=False).estimate(), machine.available_ram_bytes)
        if fit.word is not FitWord.DOES_NOT_FIT:
            need, there = memory_text(workload.estimate().expected_bytes), memory_text(gpu.free_bytes)
            why = f"on the CPU: it takes {need}, and {there} are free on {gpu.device} ({gpu.name})"
            return Placement(ON_CPU, context, fit, why)
    what = f"on the {gpu.name} of {gpu.total_bytes / GIB:.1f} GiB"
    fit = _checked(target, workload, gpu.free_bytes, what, store, force=force)
    return Placement(DevicePlace(gpu.device, workload.gpu_layers), context, fit)


def _workload(target: LocalTarget, wanted: Serving, context: int, *, on_gpu: bool) -> Workload:
    kv_type, device = KV_BITS[wanted.kv_bits], "gpu" if on_gpu else "cpu"
    settings = EstimateSettings(target.kind.memory, kv_type, device, flash_attention=kv_type != "f16")
    weights = target.weights_bytes + (0 if on_gpu else target.repacked_bytes)
    layers = wanted.gpu_layers if on_gpu and target.kind.splits else None
    profile = find_format(target.format).vram
    return Workload(target.shape, weights, profile, settings, context, wanted.slots, layers)


def _gpu(kind: RuntimeKind, wanted: str, machine: Machine, gpus: Sequence[Accelerator]) -> Accelerator | None:
    try:
        return choose(wanted, gpus)
    except LookupError as exc:
        found = ", ".join(f"{gpu.device} {gpu.name}" for gpu in gpus) or "none"
        hint = "use --device cpu"
        if machine.gpus and not gpus:
            found = f"{kind.name} can use none of {', '.join(gpu.name for gpu in machine.gpus)}"
            hint = f"use --device cpu, or install one that can: {kind.for_gpus}"
        raise UsageError(f"there is no {check_name(wanted)} here (GPUs: {found})", hint=hint) from exc


def _unused(kind: RuntimeKind, wanted: str, machine: Machine) -> str:
    """That a card is there, and the model is not on it."""
    if wanted == CPU or not machine.gpus:
        return ""
    return f"on the CPU: {kind.name} can't use the {machine.gpus[0].name}; one that can: {kind.for_gpus}"


def _rest_bytes(workload: Workload, placing: Placing) -> int:
    """Weights that stay in RAM."""
    part = replace(workload, gpu_layers=placing.place.gpu_layers).estimate()
    return replace(workload, gpu_layers=None).estimate().weights_bytes - part.weights_bytes


def _checked(target: LocalTarget, workload: Workload, free: int, what: str, store: Store, *, force: bool) -> Fit:
    """The verdict. Raises RefusedError: it does not fit, and is not forced, with what would."""
    verdict = advise(workload, free, _siblings(target, store))
    if verdict.word is not FitWord.DOES_NOT_FIT or force:
        return verdict
    said = (_in_flags(text, target.kind) for text in verdict.suggestions)
    tries = [text for text in said if text is not None]
    layers = layers_that_fit(workload, free) if workload.settings.device == "gpu" and target.kind.splits else 0
    tries += [f"--gpu-layers {layers}, the others on the CPU"] if layers else []
    message = f"{target.name} does not fit: {verdict.reason}, which is what is free {what}"
    raise RefusedError(message, hint=f"what would fit: {'; '.join(tries)}; or load it all the same with --force")


def _in_flags(suggestion: str, kind: RuntimeKind) -> str | None:
    """A suggestion with the command's own word for the KV cache; None: the runtime has it at 16 bits only."""
    for bits, kv_type in KV_BITS.items():
        text = f"KV cache at {kv_type}"
        if text in suggestion:
            return suggestion.replace(text, f"--kv-bits {bits}") if bits in kind.kv_bits else None
    return suggestion


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
        for item in store.current_artifacts(own.name)
        if item.manifest.variant != own.variant
    }


def engine_target(target: LocalTarget, wanted: Serving, placement: Placement) -> EngineTarget:
    """What the model's process is told. Raises MissingExtraError: the target's runtime is not installed."""
    named = wanted.device != "auto"
    serving = replace(
        wanted, context=placement.context, device=placement.where.device, named=named,
        gpu_layers=placement.where.gpu_layers, shares=placement.where.shares,
    )  # fmt: skip
    path = Path(os.path.abspath(target.path))  # parts of a model are found by their names: no link is followed
    model = ModelRef(path.parent, target.format, path.name) if path.is_file() else ModelRef(path, target.format)
    return EngineTarget(target.name, target.kind, model, serving, runtime_name(target))


def runtime_name(target: LocalTarget) -> str:
    """What a target runs in, with the version installed here. Raises MissingExtraError: it is not."""
    kind = target.kind
    return f"{kind.name} ({runtime_version(kind, f'serving {target.format}')})"
