"""Steps that begin with the libraries loaded: they are copies of a process that has loaded them once.

In: a function and its arguments. Out: the process that runs it. Loading torch and transformers
takes a step two to four seconds of a core, and a build has several steps a variant. The process that is copied has
loaded them, and computed nothing: what a step does to them stays in its copy.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

LIBRARIES = (
    "numpy", "safetensors.torch", "torch", "tokenizers", "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
)  # fmt: skip
# What libraries, the loader and Python itself read from the environment when they load.
READ_AT_LOAD = (
    "ACCELERATE_", "AUTOGPTQ_", "BLIS_", "CUBLAS_", "CUDA_", "DNNL_", "GGML_", "GLIBC_", "GOMP_", "GPTQMODEL_", "HF_",
    "HIP_", "HOME", "HSA_", "HUGGINGFACE_", "KMP_", "LD_", "LLAMA_", "MALLOC_", "MKL_", "NO_LOCAL_GGUF", "NVIDIA_",
    "OMP_", "ONEDNN_", "OPENBLAS_", "PATH", "PYTHON", "PYTORCH_", "ROCR_", "SAFETENSORS_", "TOKENIZERS_", "TORCH",
    "TRANSFORMERS_", "TRITON_", "USE_", "XDG_",
)  # fmt: skip
_lock = threading.Lock()
_as_started: object = None  # the surroundings that the process which is copied was started in


def start(function: Callable[..., None], args: tuple[Any, ...]) -> BaseProcess:
    """Run a function in a process of its own, which ends with this one: a copy, or, where there is nothing to copy or
    the surroundings are others than it was started in, a fresh one. Copies on Linux only: other systems' libraries
    can't be copied.
    """
    if _can_be_copied():
        copy = multiprocessing.get_context("forkserver").Process(target=function, args=args, daemon=True)
        with contextlib.suppress(EOFError, OSError):  # a library ended what is copied: the step that needs it says so
            copy.start()
            return copy
    fresh = multiprocessing.get_context("spawn").Process(target=function, args=args, daemon=True)
    fresh.start()
    return fresh


def _can_be_copied() -> bool:
    global _as_started
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return False
    with _lock:
        multiprocessing.set_forkserver_preload([__name__ + "_libraries"])
        if _as_started is None:
            _as_started = _surroundings()
        return _as_started == _surroundings()


def _surroundings() -> object:
    """What decides which libraries are loaded, and as what."""
    chosen = sorted((name, value) for name, value in os.environ.items() if name.startswith(READ_AT_LOAD))
    return chosen, list(sys.path)


def load_libraries() -> None:
    """Load what is installed of LIBRARIES; what fails here will fail in the step that needs it, which says so."""
    for name in LIBRARIES:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is never looked at by a copy's collector stays shared with it
