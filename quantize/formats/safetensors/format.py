"""A full-precision checkpoint as a Format, so that a source is opened, measured and served as artifacts are."""

from __future__ import annotations

from quantize.formats.folder import FolderLayout
from quantize.formats.format import Format, Handover
from quantize.runtimes.transformers.kind import Transformers
from quantize.runtimes.transformers.probe import TORCH_PROBES

UNQUANTIZED = "safetensors"
FORMAT = Format(
    name=UNQUANTIZED,
    extra="torch",
    layout=FolderLayout(None),
    runtime=Transformers(chooses_dtype=True),
    handover=Handover(vllm=lambda _options: ""),
    probes=TORCH_PROBES,
)
