"""mlx-lm as a kind of runtime: what a format that it reads names, without loading the library."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from quantize.runtimes.base import ModelRef, Runtime, runtime_version
from quantize.runtimes.devices import Accelerator, DevicePlace
from quantize.runtimes.mlx.load import EXTRA
from quantize.runtimes.served import Progress, ServedModel, Serving


@dataclass(frozen=True)
class MlxLm:
    """See RuntimeKind."""

    name: str = "mlx-lm"
    packages: tuple[str, ...] = ("mlx-lm", "mlx")
    extra: str = EXTRA
    memory: str = "transformers"
    first_load: str = ""
    kv_bits: tuple[str, ...] = ("16",)

    @property
    def devices(self) -> str:
        """By the machine: its memory is the GPU's on Apple silicon."""
        try:
            version("mlx")
        except PackageNotFoundError:
            return "not installed"
        return "CPU and Metal" if platform.system() == "Darwin" else "CPU only, by its build"

    @property
    def knows_gpus(self) -> bool:
        """On Apple silicon mlx chooses by itself: there is nothing to place."""
        return False

    @property
    def for_gpus(self) -> str:
        """The plain package, on Apple silicon."""
        return "pip install mlx mlx-lm"

    @property
    def splits(self) -> bool:
        """A model is in one memory."""
        return False

    def find_gpus(self) -> tuple[Accelerator, ...]:
        """None that a model could be put on."""
        return ()

    def computes_in(self, place: DevicePlace) -> str:
        """The folder's type."""
        return "auto"

    def open(self, model: ModelRef, *, context: int, threads: int, place: DevicePlace) -> Runtime:
        """See RuntimeKind."""
        from quantize.runtimes.mlx.runtime import MlxRuntime

        return MlxRuntime(model, self.name, runtime_version(self, "evaluating an MLX model"), threads)

    def serve(self, model: ModelRef, serving: Serving, progress: Progress) -> ServedModel:
        """See RuntimeKind."""
        from quantize.runtimes.mlx.served import MlxModel

        return MlxModel(self.name, model, serving, progress)


MLX_LM = MlxLm()
