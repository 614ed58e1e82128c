"""A folder in the Hugging Face layout, loaded by transformers: what checking, measuring and serving share.

In: a folder, its format, a device. Out: the model, each weight read straight to the device. No code of the model's own
is run. Call it in a worker: gptqmodel patches other libraries and reads the environment.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from quantize.errors import VerifyError, first_line, is_out_of_memory
from quantize.runtimes.base import ModelRef

LOAD_ERRORS = (ValueError, OSError, RuntimeError, KeyError, TypeError, AttributeError, NotImplementedError)


class LoadedModel(NamedTuple):
    """A model that is ready to answer. warnings: what is not as its library would have it."""

    model: Any
    warnings: tuple[str, ...] = ()


class TransformersLoader(Protocol):
    """How models of a format get into transformers; runtimes/transformers/kind.py has the one that most share."""

    @property
    def name(self) -> str: ...

    def import_torch(self, feature: str) -> Any:
        """torch, with what transformers needs for the format. Raises MissingExtraError, which names the feature."""

    def load(self, model: ModelRef, device: str) -> LoadedModel:
        """The model, ready to answer, all of it on one device. Raises VerifyError."""


def load_causal_lm(
    folder: Path, device: str = "cpu", *, dtype: Any = "auto", backend: str | None = None,
    reading: Mapping[str, Any] | None = None,
) -> Any:  # fmt: skip
    """The model in a folder, ready to answer, all of it on one device. backend: of the library that reads the format.
    reading: what else its quantization_config is to say, of how it is read.

    Raises VerifyError, with the library's ImportError as its cause where something is not installed that it runs with.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig

    chosen: dict[str, Any] = {}
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if backend is not None or reading:
                config.quantization_config |= {**(reading or {}), **({"backend": backend} if backend else {})}
                chosen["config"] = config
            loaded = auto_class(config).from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, device_map=device, dtype=dtype, **chosen
            )
    except (*LOAD_ERRORS, ImportError, SafetensorError) as exc:
        raise VerifyError(f"{folder.name}: transformers does not load it: {first_line(exc)}") from exc
    return loaded.eval()


def to_float32(model: Any) -> None:
    """Have all that is not packed in float32: of a quantized folder transformers leaves it in the type of the file."""
    from torch import nn

    for value in model.parameters():
        if type(value) is nn.Parameter and value.is_floating_point():
            value.data = value.data.float()


def auto_class(config: Any) -> Any:
    """transformers' class that builds the one which config.json names: of a causal language model, or of one that reads
    more than text, which it may have a causal one for too.
    """
    from transformers import MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM

    named = (getattr(config, "architectures", None) or [""])[0]
    if type(config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return AutoModelForCausalLM
    found = MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)]
    classes = found if isinstance(found, tuple) else (found,)
    is_named = any(each.__name__ == named for each in classes)
    return AutoModelForMultimodalLM if is_named else AutoModelForCausalLM


def load_with_any_kernel(load: Callable[[str | None], Any], backends: Sequence[str]) -> LoadedModel:
    """The model, with the kernel that its library chooses, or where that can't be had the first of `backends` that can.

    load: with a backend, or None. A kernel that is compiled on the machine needs a compiler: without one the library
    raises ImportError. Raises VerifyError: the first reason, if none works.
    """
    try:
        return LoadedModel(load(None))
    except VerifyError as exc:
        if not isinstance(exc.__cause__, ImportError) or not backends:
            raise
        first = exc
    for backend in backends:
        try:
            model = load(backend)
        except VerifyError as exc:
            if is_out_of_memory(exc):
                raise
            continue
        reason = first_line(first.__cause__ or first)
        warning = f"{kernels(model) or backend} computes, slower than what could: {reason}; `quantize doctor` says more"
        return LoadedModel(model, (warning,))
    raise first


def kernels(model: Any) -> str:
    """The classes that compute a model's quantized linears, such as "MarlinLinear"; "" where it has none."""
    return ", ".join(sorted({type(module).__name__ for module in model.modules() if hasattr(module, "qweight")}))


@contextmanager
def quiet() -> Iterator[None]:
    """Warnings of libraries being imported or loading a model are not the user's."""
    level = logging.getLogger().level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.getLogger().setLevel(level)
