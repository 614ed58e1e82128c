"""Opens a model in the runtime of its format: llama.cpp for GGUF, transformers for everything else.

In: where a model is and its format. Out: a Runtime (see base.py), loaded.
"""

from __future__ import annotations

from quantize.errors import UsageError
from quantize.runtimes.base import ModelRef, Runtime


def open_runtime(model: ModelRef, *, context: int, threads: int = 0) -> Runtime:
    """Load a model. context: the longest window or prompt and answer, in tokens. threads: 0 leaves it to the runtime.

    Raises VerifyError: it does not load. MissingExtraError: its runtime is not installed. UsageError: no such file.
    """
    if not model.path.exists():
        raise UsageError(f"{model.path}: no such {'file' if model.main_file else 'folder'}")
    if model.format == "gguf":
        from quantize.runtimes.llama_cpp.runtime import LlamaCppRuntime

        return LlamaCppRuntime(model.path, context=context, threads=threads)
    from quantize.runtimes.transformers.runtime import TransformersRuntime

    return TransformersRuntime(model, threads=threads)
