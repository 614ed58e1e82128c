"""compressed-tensors as a Format."""

from __future__ import annotations

from quantize.estimate.vram import VramProfile
from quantize.formats.compressed_tensors.runtime import COMPRESSED_TENSORS, COMPRESSED_TENSORS_PROBE, EXTRA
from quantize.formats.compressed_tensors.schemes import LEAST, SCHEMES
from quantize.formats.compressed_tensors.weights import CompressedWeights, rounded_products
from quantize.formats.folder import FolderLayout
from quantize.formats.format import CardText, Format, Handover, Options, Runs, Way, late
from quantize.formats.ways import SERVE, SGLANG, VLLM, in_transformers
from quantize.runtimes.transformers.probe import TORCH_PROBES

# Solved with one scale for a whole row, a group far below the rest of its row: 0.76 on the demo model.
GAINS_OF_SOLVED_ROWS = (0.6, 1.5)


def _ways(options: Options) -> tuple[Way, ...]:
    """Weights alone are dequantized as transformers reads them: runtime.py says why."""
    scheme = SCHEMES.get(str(options.get("scheme")))
    alone = scheme is not None and scheme.inputs is None
    return (VLLM, SGLANG, in_transformers("compressed-tensors", dequantized=alone), SERVE)


def _remark(options: Options) -> str:
    """Which GPUs run it, where not every one does that vLLM supports."""
    scheme = SCHEMES.get(str(options.get("scheme")))
    if scheme is None or scheme.capability == LEAST:
        return ""
    gpus = f"GPUs of compute capability {scheme.capability} or more"
    if scheme.on_older:
        return f"activations are FP8 on {gpus}; {scheme.on_older}"
    return f"{options['scheme']} runs on {gpus}"


def _runs() -> tuple[Runs, ...]:
    vllm = "vLLM, SGLang, transformers with compressed-tensors"
    return tuple(Runs(f"scheme: {name}", vllm, item.capability, item.on_older) for name, item in SCHEMES.items())


def _limits(options: Options) -> tuple[str, ...]:
    return (f"{remark}.",) if (remark := _remark(options)) else ()


FORMAT = Format(
    name="compressed-tensors",
    extra=EXTRA,
    layout=FolderLayout("compressed-tensors"),
    builder=late("quantize.formats.compressed_tensors.build:CompressedTensorsBuilder"),
    runtime=COMPRESSED_TENSORS,
    weights=CompressedWeights(),
    products=rounded_products,
    vram=VramProfile("vllm", unpacked_bytes=2 * 4),
    card=CardText(ways=_ways, limits=_limits),
    handover=Handover(vllm=_remark, sglang=True),
    runs=_runs(),
    advice=_remark,
    gains=lambda options: GAINS_OF_SOLVED_ROWS if options.get("scheme") == "W8A8" else None,
    probes=(*TORCH_PROBES, COMPRESSED_TENSORS_PROBE),
    quantization=lambda options: str(options["scheme"]),
)
