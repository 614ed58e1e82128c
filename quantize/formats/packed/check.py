"""A packed safetensors artifact in its real runtime: transformers loads it, another library unpacks it, it generates.

In: an artifact's folder. Out: facts, or VerifyError. Runs in a worker: gptqmodel patches other libraries on import.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.errors import NotReadWholeError, VerifyError
from quantize.events import Reporter
from quantize.formats.nothing_lost import account
from quantize.formats.packed.mixtures import is_mixture
from quantize.formats.packed.runtime import GPTQMODEL
from quantize.formats.packed.weights import open_packed
from quantize.model.architecture import anatomy_of, block_layouts
from quantize.model.checkpoint import Checkpoint
from quantize.runtimes.base import ModelRef
from quantize.runtimes.devices import CPU
from quantize.runtimes.transformers.generate import generate_twice, read_prompt
from quantize.runtimes.transformers.load import kernels
from quantize.system.memory import give_back_freed, give_back_mapped

ROWS = 256  # of a linear that are compared at once
PROBES = 32  # inputs that a kernel is tried with
KERNEL_ROUNDING, LEAST_ROUNDING = 0.02, 1e-4  # 16 bits of products and sums; a wrong group is 10 % and more
GIVE_BACK_AFTER = 1 << 24  # weights compared: some 64 MB of each temporary that a comparison makes


def check_packed(
    reporter: Reporter, folder: Path, method: str, threads: int, source: Checkpoint, folds: bool, device: str = CPU
) -> dict[str, Any]:
    """Find each tensor of the source again, load with transformers + gptqmodel, compare each linear with our own
    unpacking, generate greedily twice. folds: scales are folded into what blocks keep in high precision.

    On a CPU it is what gptqmodel unpacks that is compared; on a GPU, whose kernels have weights in an order of their
    own, what they compute. A mixture that gptqmodel does not load is compared linear by linear, on the CPU; measuring
    it then reads it block by block.
    Raises VerifyError: a tensor is lost, does not load, weights differ, logits not finite, two runs differ.
    MissingExtraError.
    """
    torch = GPTQMODEL.import_torch(f"loading {method.upper()} artifacts")
    torch.set_num_threads(threads)
    tensors = account(folder, source, folds=folds)
    prompt = read_prompt(folder)  # a tokenizer takes memory while it is read: not beside the model
    started = time.perf_counter()
    try:
        model = GPTQMODEL.load(ModelRef(folder, method), device).model
    except NotReadWholeError as exc:
        compared = compare_one_by_one(folder, method)
        return {"runtime": f"gptqmodel's kernels alone: {exc.message}", "linears": compared, "tensors": tensors}
    seconds = time.perf_counter() - started
    kernel = kernels(model)
    if device == CPU:
        compared = _compare_weights(model, folder, method, _names(source))
        _first_use(model, folder)
    else:
        compared = compare_products(model, folder, method, _names(source))
    tokens = generate_twice(model, folder, prompt)
    return {
        "runtime": "gptqmodel" if is_mixture(folder) else "transformers + gptqmodel",
        "linears": compared,
        "tensors": tensors,
        "tokens": tokens,
        "load_seconds": round(seconds, 2),
        "kernel": kernel,
    }


def _first_use(model: Any, folder: Path) -> None:
    """One forward pass, in which gptqmodel's kernels repack their weights: the pages of the old ones are given back."""
    import torch

    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    hooks = [layer.register_forward_hook(lambda *_: _give_back(folder)) for layers in lists for layer in layers]
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long))
    for hook in hooks:
        hook.remove()


def _give_back(folder: Path) -> None:
    give_back_freed()
    give_back_mapped(folder)


def _names(source: Checkpoint) -> dict[str, str]:
    """Linears as transformers calls them -> as the files do, which differs where a decoder is a part of a model."""
    anatomy = anatomy_of(source.config)
    return {
        f"{anatomy.blocks}.{layout.index}.{linear.module}": linear.tensor.removesuffix(".weight")
        for layout in block_layouts(source.config) for linear in layout.linears
    }  # fmt: skip


def _compare_weights(model: Any, folder: Path, method: str, names: Mapping[str, str]) -> int:
    """Each packed linear, dequantized by gptqmodel, against our own unpacking of the file's tensors."""
    compared = since = 0
    unpacked = open_packed(folder, method)
    known = frozenset(unpacked.linears)
    for name, module in model.named_modules():
        theirs = _dequantized_by_gptqmodel(module)
        if theirs is None:
            continue
        ours = unpacked.dequantize(name if name in known else names.get(name, name))
        if not agree(theirs, ours):
            raise VerifyError(f"{folder.name}: {name} unpacks differently in gptqmodel", hint="a packing defect")
        compared += 1
        since += theirs.numel()
        del theirs, ours
        if since > GIVE_BACK_AFTER:
            _give_back(folder)
            since = 0
    if compared != len(unpacked.linears):
        raise VerifyError(
            f"{folder.name}: gptqmodel took {compared} linears as packed, the files have {len(unpacked.linears)}"
        )
    return compared


def compare_products(model: Any, folder: Path, method: str, names: Mapping[str, str] | None = None) -> int:
    """Each packed linear, as its kernel multiplies, against products with our own unpacking of the file's tensors, on
    the model's device: of random inputs, and of zeros, which give the bias. names: of `_names`; None where they agree.

    Raises VerifyError: an output is more than KERNEL_ROUNDING of its length away, or a linear is not there.
    """
    import torch

    unpacked, generator = open_packed(folder, method), torch.Generator().manual_seed(0)
    modules = {on_disk: name for name, on_disk in (names or {}).items()}
    have = {name for name, _ in model.named_modules()}
    for linear in unpacked.linears:
        weight = unpacked.dequantize(linear, model.device)
        inputs = torch.randn(PROBES, weight.shape[1], generator=generator).to(model.device, model.dtype)
        inputs[0] = 0
        try:
            module = model.get_submodule(linear if linear in have else modules.get(linear, linear))
        except AttributeError as exc:
            raise VerifyError(f"{folder.name}: gptqmodel has no {linear}, which the files have") from exc
        with torch.inference_mode():
            found, expected = module(inputs[None])[0].float(), inputs.float() @ weight.T
        away = (found - found[:1] - expected).norm(dim=0)
        if not bool((away <= KERNEL_ROUNDING * expected.norm(dim=0) + LEAST_ROUNDING).all()):
            kernel = type(module).__name__
            hint = "a packing defect, or a fault of the kernel: `quantize verify --device cpu` tells which"
            raise VerifyError(f"{folder.name}: {linear} computes otherwise in gptqmodel's {kernel}", hint=hint)
    return len(unpacked.linears)


def compare_one_by_one(folder: Path, method: str) -> int:
    """Each packed linear, dequantized by gptqmodel without a model around it, against our own unpacking.

    Raises VerifyError: they differ.
    """
    unpacked = open_packed(folder, method)
    for linear in unpacked.linears:
        if not agree(_alone(unpacked.words(linear), unpacked.bits, method), unpacked.dequantize(linear)):
            raise VerifyError(f"{folder.name}: {linear} unpacks differently in gptqmodel", hint="a packing defect")
        give_back_freed()
    return len(unpacked.linears)


def _alone(words: Mapping[str, Any], bits: int, method: str) -> Any:
    """float32 [out, in] of one linear's tensors, as gptqmodel unpacks them."""
    import torch

    zeros, scales = words["qzeros"], words["scales"]
    if method == "awq":
        from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

        width, groups = words["qweight"].shape[0], scales.shape[0]
        return dequantize_gemm(words["qweight"], zeros, scales, bits, width // groups).float().T
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    index, out = words["g_idx"], scales.shape[1]
    shape = {"in_features": len(index), "out_features": out, "group_size": len(index) // scales.shape[0]}
    module = TorchLinear(bits=bits, sym=True, desc_act=True, bias=False, register_buffers=True, **shape)
    for name, tensor in words.items():
        setattr(module, name, tensor)
    convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    module.post_init()
    return _dequantized_by_gptqmodel(module)


def agree(theirs: Any, ours: Any, tolerance: float = 2e-3) -> bool:
    """Whether two float32 [out, in] are within 0.2 %, a few rows at a time: no temporaries of a linear's size."""
    if theirs.shape != ours.shape:
        return False
    pairs = zip(theirs.split(ROWS), ours.split(ROWS), strict=True)
    return all(bool(((left - right).abs_() <= right.abs().mul_(tolerance).add_(1e-6)).all()) for left, right in pairs)


def _dequantized_by_gptqmodel(module: Any) -> Any:
    """float32 [out, in] as gptqmodel unpacks it; None if the module is no packed linear."""
    import torch

    if hasattr(module, "awq_weight_dequantize"):
        return module.awq_weight_dequantize("cpu", torch.float32).T
    if hasattr(module, "dequantize_weight"):
        return module.dequantize_weight().float().T
    if all(hasattr(module, name) for name in ("qweight", "qzeros", "scales")):  # of AWQ in plain torch
        from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

        return dequantize_gemm(module.qweight, module.qzeros, module.scales, module.bits, module.group_size).float().T
    return None
