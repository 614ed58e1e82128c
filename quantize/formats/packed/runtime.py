"""What AWQ and GPTQ artifacts run in."""

from __future__ import annotations

from quantize.runtimes.transformers.kind import Transformers

# gptqmodel refuses to start with fewer workers, on machines of few cores.
GPTQMODEL = Transformers("gptqmodel", helper="gptqmodel", environment={"GPTQMODEL_CPU_WORKERS": "2"})
