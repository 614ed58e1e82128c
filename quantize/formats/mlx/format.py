"""MLX as a Format."""

from __future__ import annotations

from quantize.estimate.vram import VramProfile
from quantize.formats.folder import MLX, FolderLayout
from quantize.formats.format import CardText, Format, Handover, No, Options, Runs, Way, late
from quantize.formats.mlx.weights import MlxWeights
from quantize.formats.ways import SERVE
from quantize.runtimes.mlx.kind import MLX_LM
from quantize.runtimes.mlx.load import EXTRA
from quantize.runtimes.mlx.probe import MLX_PROBE

GENERATE = 'mlx_lm.generate --model . --prompt "The capital of France is"'
WAYS = (Way("mlx-lm", "sh", GENERATE), SERVE)


def _in_vllm(options: Options) -> str | No:
    return No("is for mlx-lm, on Apple silicon", "use --print mlx, or `quantize serve`")


def _quantization(options: Options) -> str:
    return str(options["mode"]) if options.get("mode", "affine") != "affine" else f"int{options['bits']}"


FORMAT = Format(
    name=MLX,
    extra=EXTRA,
    layout=FolderLayout(MLX, library="mlx"),
    builder=late("quantize.formats.mlx.build:MlxBuilder"),
    runtime=MLX_LM,
    weights=MlxWeights(),
    vram=VramProfile(),
    card=CardText(ways=lambda _options: WAYS),
    handover=Handover(vllm=_in_vllm, mlx=True),
    runs=(Runs("", "mlx-lm, LM Studio", "", "made for Apple silicon; it runs on a CPU, slowly"),),
    probes=(MLX_PROBE,),
    quantization=_quantization,
)
