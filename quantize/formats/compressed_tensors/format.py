"""compressed-tensors as a Format."""

from __future__ import annotations

from quantize.estimate.vram import VramProfile
from quantize.formats.compressed_tensors.runtime import COMPRESSED_TENSORS, COMPRESSED_TENSORS_PROBE, EXTRA
from quantize.formats.compressed_tensors.schemes import SCHEMES
from quantize.formats.compressed_tensors.weights import CompressedWeights, input_rounding
from quantize.formats.folder import FolderLayout
from quantize.formats.format import CardText, Format, Handover, Options, late
from quantize.formats.ways import SERVE, SGLANG, VLLM, in_transformers
from quantize.runtimes.transformers.probe import TORCH_PROBES

WAYS = (VLLM, SGLANG, in_transformers("compressed-tensors"), SERVE)


def _remark(options: Options) -> str:
    """Which GPUs run it, where not every one does that vLLM supports."""
    scheme = SCHEMES.get(str(options.get("scheme")))
    if scheme is None or scheme.capability <= (7, 5):
        return ""
    major, minor = scheme.capability
    return f"it multiplies in FP8 from compute capability {major}.{minor} on; on older GPUs {scheme.on_older}"


def _limits(options: Options) -> tuple[str, ...]:
    return (f"{remark}.",) if (remark := _remark(options)) else ()


FORMAT = Format(
    name="compressed-tensors",
    extra=EXTRA,
    layout=FolderLayout("compressed-tensors"),
    builder=late("quantize.formats.compressed_tensors.build:CompressedTensorsBuilder"),
    runtime=COMPRESSED_TENSORS,
    weights=CompressedWeights(),
    inputs=input_rounding,
    vram=VramProfile("vllm", unpacked_bytes=2 * 4),
    card=CardText(ways=lambda _options: WAYS, limits=_limits),
    handover=Handover(vllm=_remark),
    probes=(*TORCH_PROBES, COMPRESSED_TENSORS_PROBE),
    quantization=lambda options: str(options["scheme"]),
)
