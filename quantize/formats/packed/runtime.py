"""What AWQ and GPTQ artifacts run in."""

from __future__ import annotations

from quantize.runtimes.probe import Probe
from quantize.runtimes.transformers.kind import Transformers

# gptqmodel refuses to start with fewer workers, on machines of few cores.
GPTQMODEL = Transformers("gptqmodel", helper="gptqmodel", environment={"GPTQMODEL_CPU_WORKERS": "2"})


def try_gptqmodel() -> str:
    """Its import, as loading an artifact does it."""
    GPTQMODEL.import_torch("the GPTQ format")
    import gptqmodel

    return f"imported, as version {gptqmodel.__version__}"


GPTQMODEL_PROBE = Probe("gptqmodel", "gptqmodel", try_gptqmodel)
