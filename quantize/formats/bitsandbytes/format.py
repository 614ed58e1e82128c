"""bitsandbytes INT8 and NF4 as a Format."""

from __future__ import annotations

from quantize.estimate.vram import VramProfile
from quantize.formats.bitsandbytes.probe import BITSANDBYTES_PROBE
from quantize.formats.bitsandbytes.weights import BitsandbytesWeights, int8_products
from quantize.formats.folder import FolderLayout
from quantize.formats.format import CardText, Format, Handover, No, Options, Runs, Way, late
from quantize.formats.ways import SERVE, VLLM, in_transformers
from quantize.numerics.constants import INT8_LOGGER
from quantize.runtimes.transformers.kind import Transformers
from quantize.runtimes.transformers.probe import TORCH_PROBES

INT8_HINT = "serve it with `quantize serve`, which runs it in transformers, or build an awq or gptq variant"
BITSANDBYTES = Transformers("bnb", helper="bitsandbytes", chooses_dtype=True, silenced=(INT8_LOGGER,))
# An int8 copy of the activations and int32 products: LLM.int8(), arXiv:2208.07339.
VRAM = VramProfile(unpacked_bytes=2, activation_bytes=5)


def _is_nf4(options: Options) -> bool:
    return options.get("type") == "nf4"


def _ways(options: Options) -> tuple[Way, ...]:
    return (*([VLLM] if _is_nf4(options) else []), in_transformers("bitsandbytes"), SERVE)


def _limits(options: Options) -> tuple[str, ...]:
    return () if _is_nf4(options) else ("vLLM does not take pre-quantized bitsandbytes INT8.",)


def _in_vllm(options: Options) -> str | No:
    if _is_nf4(options):
        return "NF4 runs in vLLM without CUDA graphs, slower than AWQ or GPTQ"
    return No("vLLM does not take pre-quantized bitsandbytes INT8", INT8_HINT)


FORMAT = Format(
    name="bitsandbytes",
    extra=BITSANDBYTES.extra,
    layout=FolderLayout("bitsandbytes"),
    checks=2,
    builder=late("quantize.formats.bitsandbytes.build:BitsandbytesBuilder"),
    runtime=BITSANDBYTES,
    weights=BitsandbytesWeights(),
    products=int8_products,
    vram=VRAM,
    card=CardText(ways=_ways, limits=_limits),
    handover=Handover(vllm=_in_vllm),
    runs=(
        Runs("type: int8", "transformers with bitsandbytes", "7.5"),
        Runs("type: nf4", "transformers with bitsandbytes, vLLM", "6.0", "slow in vLLM"),
    ),
    probes=(*TORCH_PROBES, BITSANDBYTES_PROBE),
)
