"""transformers as a kind of runtime, with the library that a format needs beside it.

In: what a format says of itself. Out: a RuntimeKind; torch, imported with that library. Nothing heavy is
imported before a model is opened.
"""

from __future__ import annotations

import importlib
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quantize.errors import MissingExtraError
from quantize.runtimes.base import ModelRef, Runtime, runtime_version
from quantize.runtimes.devices import CPU, Accelerator, DevicePlace
from quantize.runtimes.served import Progress, ServedModel, Serving
from quantize.runtimes.transformers.load import (
    LoadedModel,
    load_causal_lm,
    load_with_any_kernel,
    quiet,
    to_float32,
)
from quantize.system.gpus import nvidia_gpus


@dataclass(frozen=True)
class Transformers:
    """See RuntimeKind.

    helper: the module of the library that transformers needs to read the format; its distribution has the same name,
    with hyphens. environment: what that library wants to find, where the user has not set it. chooses_dtype: whether
    the folder leaves open in which dtype to compute. kernels: by format, what computes instead where the helper's first
    choice can't be compiled. first_load: what takes long the first time that a model is loaded on a GPU, in words; ""
    for nothing. silenced: loggers of the helper whose warnings say nothing new.
    """

    extra: str = "torch"
    helper: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    chooses_dtype: bool = False
    kernels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    first_load: str = ""
    silenced: tuple[str, ...] = ()
    name: str = "transformers"
    memory: str = "transformers"
    kv_bits: tuple[str, ...] = ("16",)

    @property
    def packages(self) -> tuple[str, ...]:
        """transformers, torch and the helper."""
        return ("transformers", "torch", *([self.helper.replace("_", "-")] if self.helper else []))

    @property
    def devices(self) -> str:
        """By the name of torch's build."""
        try:
            build = version("torch").partition("+")[2]
        except PackageNotFoundError:
            return "not installed"
        if build == "cpu":
            return "CPU only, by its build"
        return f"CPU and {build}, by its build" if build else "CPU; CUDA where a driver is (its version does not tell)"

    @property
    def knows_gpus(self) -> bool:
        """A build for the CPU has none; one for CUDA only where a driver is."""
        build = self.devices
        return not build.startswith(("CPU only", "not")) and ("rocm" in build or bool(nvidia_gpus()))

    @property
    def for_gpus(self) -> str:
        """Its wheels are of CUDA, but where an index of CPU builds was named."""
        return "pip install --force-reinstall --no-cache-dir torch"

    @property
    def splits(self) -> bool:
        """A model is on one device."""
        return False

    def find_gpus(self) -> tuple[Accelerator, ...]:
        """See RuntimeKind; a torch that can have none is not loaded."""
        return visible_gpus(self.import_torch("looking for GPUs")) if self.knows_gpus else ()

    def open(self, model: ModelRef, *, context: int, threads: int, place: DevicePlace) -> Runtime:
        """See RuntimeKind."""
        from quantize.runtimes.transformers.runtime import TransformersRuntime

        known = runtime_version(self, f"evaluating a {model.format} model")
        return TransformersRuntime(self, model, known, threads, place.device)

    def serve(self, model: ModelRef, serving: Serving, progress: Progress) -> ServedModel:
        """See RuntimeKind."""
        from quantize.runtimes.transformers.served import TransformersModel

        return TransformersModel(self, model, serving, progress)

    def load(self, model: ModelRef, device: str) -> LoadedModel:
        """See TransformersLoader; a format that transformers does not read by itself overrides this."""
        dtype = self.computes_in(DevicePlace(device))

        def load(backend: str | None) -> Any:
            loaded = load_causal_lm(model.folder, device, dtype=dtype, backend=backend)
            if dtype == "float32":
                to_float32(loaded)
            return loaded

        return load_with_any_kernel(load, self.kernels.get(model.format, ()))

    def import_torch(self, feature: str) -> Any:
        """See TransformersLoader."""
        for name, value in {**self.environment, **_caches()}.items():
            os.environ.setdefault(name, value)
        try:
            with quiet():
                import torch
                import transformers

                if self.helper is not None:
                    importlib.import_module(self.helper)  # transformers imports it late; say here what is missing
        except ImportError as exc:
            raise MissingExtraError(feature, self.extra) from exc
        for logger in self.silenced:
            logging.getLogger(logger).setLevel(logging.ERROR)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        return torch

    def computes_in(self, place: DevicePlace) -> str:
        """See RuntimeKind: a CPU is fastest in float32, where the format leaves the choice; auto is the folder's."""
        return "float32" if place.kind == CPU and self.chooses_dtype else "auto"


def _caches() -> dict[str, str]:
    """Where compiled kernels are kept, for a user whose home can't be written to, as in a container."""
    if os.access(Path.home(), os.W_OK | os.X_OK):
        return {}
    folder = Path(tempfile.gettempdir()) / f"quantize-kernels-{os.getuid() if hasattr(os, 'getuid') else 0}"
    return {name: str(folder / name.lower()) for name in ("GPTQMODEL_TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")}


def visible_gpus(torch: Any) -> tuple[Accelerator, ...]:
    """The GPUs that torch sees, with what is free on them: by the driver, which takes no memory, or by torch."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = nvidia_gpus()
    if len(known) == count and all(gpu.vram_bytes for gpu in known):
        return tuple(
            Accelerator(f"cuda:{index}", gpu.name, gpu.vram_bytes, gpu.vram_bytes - gpu.used_bytes)
            for index, gpu in enumerate(known)
        )
    found = []
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        found.append(Accelerator(f"cuda:{index}", str(torch.cuda.get_device_name(index)), int(total), int(free)))
    return tuple(found)
