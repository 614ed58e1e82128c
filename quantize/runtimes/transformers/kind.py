"""transformers as a kind of runtime, with the library that a format needs beside it.

In: what a format says of itself. Out: a RuntimeKind; torch, imported with that library. Nothing heavy is
imported before a model is opened.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from quantize.errors import MissingExtraError
from quantize.runtimes.base import ModelRef, Runtime, runtime_version
from quantize.runtimes.served import Progress, ServedModel, Serving
from quantize.runtimes.transformers.load import load_causal_lm, quiet


@dataclass(frozen=True)
class Transformers:
    """See RuntimeKind.

    helper: the library that transformers needs to read the format, as a distribution and a module. environment: what
    that library wants to find, where the user has not set it. chooses_dtype: whether the folder leaves open in which
    dtype to compute.
    """

    extra: str = "torch"
    helper: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    chooses_dtype: bool = False
    name: str = "transformers"
    memory: str = "transformers"

    @property
    def packages(self) -> tuple[str, ...]:
        """transformers, torch and the helper."""
        return ("transformers", "torch", *([self.helper] if self.helper else []))

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

    def open(self, model: ModelRef, *, context: int, threads: int) -> Runtime:
        """See RuntimeKind."""
        from quantize.runtimes.transformers.runtime import TransformersRuntime

        return TransformersRuntime(self, model, runtime_version(self, f"evaluating a {model.format} model"), threads)

    def serve(self, model: ModelRef, serving: Serving, progress: Progress) -> ServedModel:
        """See RuntimeKind."""
        from quantize.runtimes.transformers.served import TransformersModel

        return TransformersModel(self, model, serving, progress)

    def load(self, model: ModelRef, device: str) -> Any:
        """See TransformersLoader; a format that transformers does not read by itself overrides this."""
        return load_causal_lm(model.folder, device, dtype=self.dtype(device))

    def import_torch(self, feature: str) -> Any:
        """See TransformersLoader."""
        for name, value in self.environment.items():
            os.environ.setdefault(name, value)
        try:
            with quiet():
                import torch
                import transformers

                if self.helper is not None:
                    importlib.import_module(self.helper)  # transformers imports it late; say here what is missing
        except ImportError as exc:
            raise MissingExtraError(feature, self.extra) from exc
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        return torch

    def dtype(self, device: str) -> Any:
        """The dtype to compute in: a CPU is fastest in float32, where the format leaves the choice."""
        import torch

        return torch.float32 if device == "cpu" and self.chooses_dtype else "auto"
