"""AWQ INT4 as a Format."""

from __future__ import annotations

from quantize.formats.awq.build import AwqBuilder
from quantize.formats.folder import FolderLayout
from quantize.formats.format import CardText, Format, Handover
from quantize.formats.packed_weights import GPTQMODEL, PACKED_VRAM, WAYS, PackedMatrices

FORMAT = Format(
    name="awq",
    extra=GPTQMODEL.extra,
    layout=FolderLayout("awq"),
    builder=AwqBuilder(),
    runtime=GPTQMODEL,
    weights=PackedMatrices("awq", folded=True),
    vram=PACKED_VRAM,
    card=CardText(ways=lambda _options: WAYS),
    handover=Handover(vllm=lambda _options: ""),
)
