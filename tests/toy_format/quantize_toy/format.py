"""The toy as a Format: every facet that there is, each as plain as it can be."""

from __future__ import annotations

from quantize.estimate.vram import VramProfile
from quantize.formats.format import CardText, Format, Handover, No, Options, Way
from quantize.formats.ways import SERVE
from quantize.runtimes.transformers.probe import TORCH_PROBES
from quantize_toy.build import ToyBuilder
from quantize_toy.container import ToyLayout
from quantize_toy.runtime import TOY_PROBE, ToyKind
from quantize_toy.weights import ToyWeights

NUMPY = """\
import numpy

weights = numpy.load("{file}")
linear = "model.layers.0.mlp.up_proj"
print(weights[f"{linear}/codes"] * weights[f"{linear}/scales"][:, None])
"""


def _limits(options: Options) -> tuple[str, ...]:
    return ("Its rows are rounded to nearest, none looked at twice.",) if not options.get("search") else ()


FORMAT = Format(
    name="toy",
    extra="torch",
    layout=ToyLayout(),
    builder=ToyBuilder(),
    revision=1,
    runtime=ToyKind(),
    weights=ToyWeights(),
    vram=VramProfile("transformers", unpacked_bytes=4),  # one linear at a time, in float32
    card=CardText(ways=lambda _options: (Way("numpy", "python", NUMPY), SERVE), limits=_limits),
    handover=Handover(
        vllm=lambda _options: No("vLLM does not read .npz files", "serve it with `quantize serve`"),
    ),
    quantization=lambda options: "int8-rows-searched" if options.get("search") else "int8-rows",
    probes=(*TORCH_PROBES, TOY_PROBE),
)
