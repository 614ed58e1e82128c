"""Mixtures of experts with packed linears: which artifacts are one, and how gptqmodel loads them.

In: an artifact's folder. Out: the model, its experts one module each, as the files have them, for vLLM and SGLang too.
Call it in a worker: gptqmodel patches other libraries on import.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

from quantize.errors import NotReadWholeError, VerifyError, first_line
from quantize.formats.packed.weights import packed_linears
from quantize.runtimes.transformers.load import LOAD_ERRORS, quiet

REASON_CHARACTERS = 120  # gptqmodel names every tensor that it misses
_EXPERT = re.compile(r"\.experts\.\d+\.")


def is_mixture(folder: Path) -> bool:
    """Whether experts are among its packed linears. Raises CheckpointError."""
    return any(_EXPERT.search(name) for name in packed_linears(folder))


def load_mixture(folder: Path, device: str, backend: str | None = None) -> Any:
    """The model, ready to answer, all of it on one device, in the dtype of its folder.

    Raises VerifyError; NotReadWholeError: gptqmodel knows its experts by other names, or not at all.
    """
    from gptqmodel import GPTQModel
    from safetensors import SafetensorError
    from transformers import AutoConfig

    chosen = {} if backend is None else {"backend": backend}
    try:
        with quiet(), contextlib.redirect_stdout(io.StringIO()):
            dtype = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).dtype
            loaded = GPTQModel.load(str(folder), device=device, dtype=dtype, trust_remote_code=False, **chosen)
    except ImportError as exc:
        raise VerifyError(f"{folder.name}: gptqmodel does not load it: {first_line(exc)}") from exc
    except (*LOAD_ERRORS, SafetensorError) as exc:
        raise _not_read(folder, first_line(exc)) from exc
    model = loaded.model
    taken = {name for name, module in model.named_modules() if hasattr(module, "qweight")}
    missing = sorted(packed_linears(folder) - taken)
    if missing:
        raise _not_read(folder, f"it takes no packed {missing[0]} and {len(missing) - 1} more")
    return model.eval()


def _not_read(folder: Path, reason: str) -> NotReadWholeError:
    message = f"{folder.name}: gptqmodel does not load this mixture: {reason[:REASON_CHARACTERS]}"
    return NotReadWholeError(message, hint="the files are those that vLLM and SGLang read: serve it there")
