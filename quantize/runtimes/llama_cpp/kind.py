"""llama.cpp as a kind of runtime: what a format that it reads names, without loading the library."""

from __future__ import annotations

from dataclasses import dataclass

from quantize.errors import UsageError
from quantize.files.gguf import EXTRA
from quantize.runtimes.base import ModelRef, Runtime, runtime_version
from quantize.runtimes.served import Progress, ServedModel, Serving


@dataclass(frozen=True)
class LlamaCpp:
    """See RuntimeKind."""

    name: str = "llama.cpp"
    packages: tuple[str, ...] = ("llama-cpp-python",)
    extra: str = EXTRA
    memory: str = "llama.cpp"

    def open(self, model: ModelRef, *, context: int, threads: int) -> Runtime:
        """See RuntimeKind. Raises UsageError: the model names no file."""
        from quantize.runtimes.llama_cpp.runtime import LlamaCppRuntime

        if model.main_file is None:
            raise UsageError("a GGUF model needs the name of its file")
        known = self.name, runtime_version(self, "evaluating a GGUF file")
        return LlamaCppRuntime(model.path, known, context=context, threads=threads)

    def serve(self, model: ModelRef, serving: Serving, progress: Progress) -> ServedModel:
        """See RuntimeKind."""
        from quantize.runtimes.llama_cpp.served import LlamaCppModel

        return LlamaCppModel(model, serving, progress)


LLAMA_CPP = LlamaCpp()
