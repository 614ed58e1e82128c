"""What AWQ and GPTQ artifacts run in: transformers, which gptqmodel teaches to compute with packed linears.

A mixture of experts in gptqmodel alone: transformers has all experts of a block in one tensor and reads none packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.runtimes.base import ModelRef
from quantize.runtimes.devices import CPU, DevicePlace
from quantize.runtimes.probe import Probe
from quantize.runtimes.transformers.kind import Transformers
from quantize.runtimes.transformers.load import LoadedModel, load_causal_lm, load_with_any_kernel

# gptqmodel refuses to start with fewer workers, on machines of few cores. Offline it downloads no sources at load time.
ENVIRONMENT = {"GPTQMODEL_CPU_WORKERS": "2", "GPTQMODEL_OFFLINE": "1"}
# Its first choice is compiled by nvcc. Triton brings a compiler of its own; torch needs none.
KERNELS = {"gptq": ("gptq_triton", "gptq_torch"), "awq": ("gemm_triton", "torch_awq")}
# What gptqmodel chooses on a CPU calls torch's product of 4-bit weights, whatever their shape; these take any.
CPU_KERNELS = {"gptq": "gptq_torch", "awq": "torch_awq"}
CPU_OUTPUTS, CPU_GROUPS = 16, (32, 64, 128, 256)
FIRST_LOAD = "kernels are compiled the first time that a model is loaded on a GPU: minutes, once"


@dataclass(frozen=True)
class PackedTransformers(Transformers):
    """See RuntimeKind."""

    def load(self, model: ModelRef, device: str) -> LoadedModel:
        """See TransformersLoader. Raises NotReadWholeError: gptqmodel does not read this kind of mixture."""
        from quantize.formats.packed.mixtures import is_mixture, load_mixture

        mixture, dtype = is_mixture(model.folder), self.computes_in(DevicePlace(device))

        def load(backend: str | None) -> Any:
            if mixture:
                return load_mixture(model.folder, device, backend)
            return load_causal_lm(model.folder, device, dtype=dtype, backend=backend)

        if DevicePlace(device).kind == CPU and (odd := odd_linear(model.folder, model.format)) is not None:
            backend = CPU_KERNELS[model.format]
            return LoadedModel(load(backend), (f"{backend} computes, slower than what could: {odd}",))
        return load_with_any_kernel(load, self.kernels.get(model.format, ()))


def odd_linear(folder: Path, method: str) -> str | None:
    """Why torch's product of 4-bit weights on a CPU does not take a packed linear; None where it takes all.

    Raises CheckpointError, VerifyError.
    """
    from quantize.formats.packed.weights import open_packed

    packed = open_packed(folder, method)
    if packed.bits != 4:
        return None
    for name in packed.linears:
        if (outputs := packed.outputs(name)) % CPU_OUTPUTS:
            return f"{name} has {outputs:,} outputs, and torch's product of 4 bits takes multiples of {CPU_OUTPUTS}"
        if (group := packed.group_size(name)) not in CPU_GROUPS:
            sizes = ", ".join(map(str, CPU_GROUPS))
            return f"{name} has groups of {group:,} weights, and torch's product of 4 bits takes {sizes}"
    return None


GPTQMODEL = PackedTransformers(
    "gptqmodel", helper="gptqmodel", environment=ENVIRONMENT, kernels=KERNELS, first_load=FIRST_LOAD
)


def try_gptqmodel() -> str:
    """Its import, as loading an artifact does it."""
    GPTQMODEL.import_torch("the GPTQ format")
    import gptqmodel

    return f"imported, as version {gptqmodel.__version__}"


GPTQMODEL_PROBE = Probe("gptqmodel", "gptqmodel", try_gptqmodel)
