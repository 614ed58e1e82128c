"""GPTQ as a Format."""

from __future__ import annotations

from quantize.formats.folder import FolderLayout
from quantize.formats.format import CardText, Format, Handover
from quantize.formats.gptq.build import GptqBuilder
from quantize.formats.packed_weights import GPTQMODEL, PACKED_VRAM, WAYS, PackedMatrices

FORMAT = Format(
    name="gptq",
    extra=GPTQMODEL.extra,
    layout=FolderLayout("gptq"),
    builder=GptqBuilder(),
    runtime=GPTQMODEL,
    weights=PackedMatrices("gptq", folded=False),
    vram=PACKED_VRAM,
    card=CardText(ways=lambda _options: WAYS),
    handover=Handover(vllm=lambda _options: ""),
)
