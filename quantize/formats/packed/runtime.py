"""What AWQ and GPTQ artifacts run in."""

from __future__ import annotations

from quantize.runtimes.probe import Probe
from quantize.runtimes.transformers.kind import Transformers

# gptqmodel refuses to start with fewer workers, on machines of few cores. Offline it downloads no sources at load time.
ENVIRONMENT = {"GPTQMODEL_CPU_WORKERS": "2", "GPTQMODEL_OFFLINE": "1"}
# Its first choice is compiled by nvcc. Triton brings a compiler of its own; torch needs none.
KERNELS = {"gptq": ("gptq_triton", "gptq_torch"), "awq": ("gemm_triton", "torch_awq")}
FIRST_LOAD = "kernels are compiled the first time that a model is loaded on a GPU: minutes, once"
GPTQMODEL = Transformers(
    "gptqmodel", helper="gptqmodel", environment=ENVIRONMENT, kernels=KERNELS, first_load=FIRST_LOAD
)


def try_gptqmodel() -> str:
    """Its import, as loading an artifact does it."""
    GPTQMODEL.import_torch("the GPTQ format")
    import gptqmodel

    return f"imported, as version {gptqmodel.__version__}"


GPTQMODEL_PROBE = Probe("gptqmodel", "gptqmodel", try_gptqmodel)
