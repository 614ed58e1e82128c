"""A folder in mlx-lm: loaded, its arrays as torch's. Call it in a worker.

Only the parts of mlx-lm that read a model are used; its tokenizers are not: token ids are the source's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import MissingExtraError, VerifyError, first_line
from quantize.runtimes.transformers.load import LOAD_ERRORS, quiet

if TYPE_CHECKING:
    from torch import Tensor

EXTRA = "mlx"


def check_installed(feature: str) -> None:
    """Raises MissingExtraError: mlx or mlx-lm is not there."""
    try:
        with quiet():
            import mlx.core  # noqa: F401 - only to say plainly that it is missing
            import mlx_lm.utils  # noqa: F401 - the same
    except ImportError as exc:
        raise MissingExtraError(feature, EXTRA) from exc


def load(folder: Path) -> Any:
    """The model of a folder, its weights in memory. Raises VerifyError: mlx-lm does not load it."""
    from mlx_lm.utils import load_model

    try:
        with quiet():
            model, _ = load_model(folder)
    except (*LOAD_ERRORS, ImportError) as exc:
        raise VerifyError(f"{folder.name}: mlx-lm does not load it: {first_line(exc)}") from exc
    return model


def computes_on_cpu() -> bool:
    """Whether mlx has no GPU here."""
    import mlx.core as mx

    return not mx.metal.is_available() or mx.default_device() == mx.Device(mx.cpu)


def dequantized(model: Any) -> Any:
    """The same model with plain linears in float32: on a CPU mlx multiplies words of bits without BLAS, a hundred times
    slower. The weights are the same numbers.
    """
    import mlx.core as mx
    from mlx_lm.utils import dequantize_model

    model.set_dtype(mx.float32)  # scales and biases first: their sum is rounded to their own type
    plain = dequantize_model(model)
    plain.set_dtype(mx.float32)
    mx.eval(plain.parameters())
    return plain


def to_torch(array: Any) -> Tensor:
    """float32, as torch has it. array: of mlx, of any floating type."""
    import mlx.core as mx
    import numpy as np
    import torch

    return torch.from_numpy(np.array(array.astype(mx.float32)))
