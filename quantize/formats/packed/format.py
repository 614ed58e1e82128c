"""AWQ and GPTQ as Formats: they differ in their builders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantize.estimate.vram import VramProfile
from quantize.formats.folder import FolderLayout
from quantize.formats.format import CardText, Format, Handover, Runs
from quantize.formats.packed.runtime import GPTQMODEL, GPTQMODEL_PROBE
from quantize.formats.packed.weights import PackedMatrices
from quantize.formats.ways import FOR_VLLM, SERVE, SGLANG, VLLM, in_transformers
from quantize.runtimes.transformers.probe import TORCH_PROBES

if TYPE_CHECKING:
    from quantize.formats.base import Builder

WAYS = (VLLM, SGLANG, in_transformers("gptqmodel"), SERVE)


def packed_format(name: str, builder: Builder[Any], *, folded: bool = False) -> Format:
    """The format of a builder's artifacts. name: what their config.json calls the method. folded: see Weights."""
    return Format(
        name=name,
        extra=GPTQMODEL.extra,
        layout=FolderLayout(name),
        builder=builder,
        checks=2,
        runtime=GPTQMODEL,
        weights=PackedMatrices(name, folded=folded),
        vram=VramProfile("vllm", unpacked_bytes=2 * 4),
        card=CardText(ways=lambda _options: WAYS),
        handover=Handover(vllm=lambda _options: "", sglang=True),
        runs=(Runs("", "vLLM, SGLang, transformers with gptqmodel", "7.5"),),
        advice=lambda _options: FOR_VLLM,
        probes=(*TORCH_PROBES, GPTQMODEL_PROBE),
    )
