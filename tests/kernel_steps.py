"""Steps that load a packed artifact: where gptqmodel's first choice of kernel can't be had, on an emulated GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

from quantize.errors import VerifyError
from quantize.events import Reporter
from quantize.formats.packed.check import check_packed, compare_products
from quantize.formats.packed.runtime import GPTQMODEL
from quantize.model.checkpoint import Checkpoint
from quantize.runtimes.base import ModelRef
from quantize.runtimes.transformers.load import LoadedModel, kernels
from tests.emulated import emulated_gpu, put_on_gpu


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


def try_kernels(
    reporter: Reporter, folder: Path, method: str, source: Checkpoint, *, on_gpu: bool
) -> tuple[int, str, dict[str, Any], list[str]]:
    """How many linears compute what the files say; what is said where one output of one of them does not; the facts of
    a verification on the emulated GPU, if `on_gpu`, and the devices that it asked the model for.
    """
    torch = GPTQMODEL.import_torch("a test")
    model = GPTQMODEL.load(ModelRef(folder, method), "cpu").model
    good, said = compare_products(model, folder, method), ""
    linear = next(module for module in model.modules() if hasattr(module, "qweight"))
    forward = linear.forward

    def broken(states: Any) -> Any:
        output = forward(states)
        output[..., 7] = output[..., 7] * 1.1
        return output

    with mock.patch.object(linear, "forward", broken), torch.inference_mode():
        try:
            compare_products(model, folder, method)
        except VerifyError as exc:
            said = exc.message
    asked: list[str] = []
    if not on_gpu:
        return good, said, {}, asked
    another = GPTQMODEL.load(ModelRef(folder, method), "cpu").model  # the first forward pass makes it a CPU's
    another.set_attn_implementation("eager")

    def load(_self: object, _model: ModelRef, device: str) -> LoadedModel:
        asked.append(device)
        return LoadedModel(put_on_gpu(another))

    with mock.patch.object(type(GPTQMODEL), "load", load), emulated_gpu():
        return good, said, check_packed(reporter, folder, method, 1, source, True, "cuda:0"), asked
