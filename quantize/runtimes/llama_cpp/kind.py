"""llama.cpp as a kind of runtime: what a format that it reads names, without loading the library."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from quantize.errors import UsageError
from quantize.files.gguf import EXTRA
from quantize.runtimes.base import ModelRef, Runtime, runtime_version
from quantize.runtimes.devices import Accelerator, DevicePlace
from quantize.runtimes.llama_cpp.devices import build_line, find_gpus
from quantize.runtimes.served import KV_BITS, Progress, ServedModel, Serving

GPU_LIBRARIES = {"cuda": "CUDA", "hip": "ROCm", "vulkan": "Vulkan", "metal": "Metal", "sycl": "SYCL"}


@dataclass(frozen=True)
class LlamaCpp:
    """See RuntimeKind."""

    name: str = "llama.cpp"
    packages: tuple[str, ...] = ("llama-cpp-python",)
    extra: str = EXTRA
    memory: str = "llama.cpp"
    first_load: str = ""
    kv_bits: tuple[str, ...] = tuple(KV_BITS)

    @property
    def devices(self) -> str:
        """By the libraries beside it; found without importing it."""
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or not spec.submodule_search_locations:
            return "not installed"
        folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
        names = {path.name for path in folder.glob("*ggml-*")}
        found = [word for key, word in GPU_LIBRARIES.items() if any(f"ggml-{key}" in name for name in names)]
        return f"CPU and {', '.join(found)}" if found else "CPU only, by its build"

    @property
    def knows_gpus(self) -> bool:
        """By the libraries beside it."""
        return self.devices.startswith("CPU and")

    @property
    def for_gpus(self) -> str:
        """It is compiled where it is installed."""
        return build_line()

    @property
    def splits(self) -> bool:
        """It deals layers out."""
        return True

    def find_gpus(self) -> tuple[Accelerator, ...]:
        """See RuntimeKind; a build without libraries for GPUs is not loaded."""
        return find_gpus() if self.knows_gpus else ()

    def computes_in(self, place: DevicePlace) -> str:
        """See RuntimeKind; its kernels choose."""
        return "auto"

    def open(self, model: ModelRef, *, context: int, threads: int, place: DevicePlace) -> Runtime:
        """See RuntimeKind. Raises UsageError: the model names no file."""
        from quantize.runtimes.llama_cpp.runtime import LlamaCppRuntime

        if model.main_file is None:
            raise UsageError("a GGUF model needs the name of its file")
        known = self.name, runtime_version(self, "evaluating a GGUF file")
        return LlamaCppRuntime(model.path, known, context=context, threads=threads, place=place)

    def serve(self, model: ModelRef, serving: Serving, progress: Progress) -> ServedModel:
        """See RuntimeKind."""
        from quantize.runtimes.llama_cpp.served import LlamaCppModel

        return LlamaCppModel(model, serving, progress)


LLAMA_CPP = LlamaCpp()
