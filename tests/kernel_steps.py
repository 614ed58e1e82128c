"""Steps that load a packed artifact where the kernel that gptqmodel likes best can't be had."""

from __future__ import annotations

from typing import Any

from quantize.events import Reporter
from quantize.formats.packed.runtime import GPTQMODEL
from quantize.runtimes.base import ModelRef
from quantize.runtimes.transformers.load import kernels


def load_without_compiler(reporter: Reporter, model: ModelRef) -> tuple[str, str, tuple[str, ...], bool]:
    """The kernel of its choice, the one without it, what is warned of, and whether the two agree on a token."""
    torch = GPTQMODEL.import_torch("a test")
    best = GPTQMODEL.load(model, "cpu").model
    first = kernels(best)
    linear = next(module for module in best.modules() if hasattr(module, "qweight"))
    ids = torch.arange(3, 11)[None]
    with torch.inference_mode():
        expected = best(ids).logits

    def fail(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("the torch.ops kernels are not installed: nvcc was not found")

    type(linear).post_init = fail
    loaded = GPTQMODEL.load(model, "cpu")
    with torch.inference_mode():
        same = torch.allclose(loaded.model(ids).logits, expected, atol=0.05, rtol=0.05)
    return first, kernels(loaded.model), loaded.warnings, bool(same)
