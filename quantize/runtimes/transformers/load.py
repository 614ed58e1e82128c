"""A folder in the Hugging Face layout, loaded by transformers: what checking, measuring and serving share.

In: a folder, its format, a device. Out: the model, each weight read straight to the device. No code of the model's own
is run. Call it in a worker: gptqmodel patches other libraries and reads the environment.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from quantize.errors import VerifyError, first_line
from quantize.runtimes.base import ModelRef

LOAD_ERRORS = (ValueError, OSError, RuntimeError, KeyError, TypeError, AttributeError, NotImplementedError)


class TransformersLoader(Protocol):
    """How models of a format get into transformers; runtimes/transformers/kind.py has the one that most share."""

    @property
    def name(self) -> str: ...

    def import_torch(self, feature: str) -> Any:
        """torch, with what transformers needs for the format. Raises MissingExtraError, which names the feature."""

    def load(self, model: ModelRef, device: str) -> Any:
        """The model, ready to answer, all of it on one device. Raises VerifyError."""


def load_causal_lm(folder: Path, device: str = "cpu", *, dtype: Any = "auto") -> Any:
    """The model in a folder, ready to answer, all of it on one device. Raises VerifyError."""
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            loaded = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, device_map=device, dtype=dtype
            )
    except LOAD_ERRORS as exc:
        raise VerifyError(f"{folder.name}: transformers does not load it: {first_line(exc)}") from exc
    return loaded.eval()


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
