"""What AWQ and GPTQ artifacts run in: transformers, which gptqmodel teaches to compute with packed linears.

A mixture of experts in gptqmodel alone: transformers has all experts of a block in one tensor and reads none packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantize.runtimes.base import ModelRef
from quantize.runtimes.probe import Probe
from quantize.runtimes.transformers.kind import Transformers
from quantize.runtimes.transformers.load import LoadedModel, load_with_any_kernel

# gptqmodel refuses to start with fewer workers, on machines of few cores. Offline it downloads no sources at load time.
ENVIRONMENT = {"GPTQMODEL_CPU_WORKERS": "2", "GPTQMODEL_OFFLINE": "1"}
# Its first choice is compiled by nvcc. Triton brings a compiler of its own; torch needs none.
KERNELS = {"gptq": ("gptq_triton", "gptq_torch"), "awq": ("gemm_triton", "torch_awq")}
FIRST_LOAD = "kernels are compiled the first time that a model is loaded on a GPU: minutes, once"


@dataclass(frozen=True)
class PackedTransformers(Transformers):
    """See RuntimeKind."""

    def load(self, model: ModelRef, device: str) -> LoadedModel:
        """See TransformersLoader. Raises NotReadWholeError: gptqmodel does not read this kind of mixture."""
        from quantize.formats.packed.mixtures import is_mixture, load_mixture

        if not is_mixture(model.folder):
            return super().load(model, device)

        def load(backend: str | None) -> Any:
            return load_mixture(model.folder, device, backend)

        return load_with_any_kernel(load, self.kernels.get(model.format, ()))


GPTQMODEL = PackedTransformers(
    "gptqmodel", helper="gptqmodel", environment=ENVIRONMENT, kernels=KERNELS, first_load=FIRST_LOAD
)


def try_gptqmodel() -> str:
    """Its import, as loading an artifact does it."""
    GPTQMODEL.import_torch("the GPTQ format")
    import gptqmodel

    return f"imported, as version {gptqmodel.__version__}"


GPTQMODEL_PROBE = Probe("gptqmodel", "gptqmodel", try_gptqmodel)
