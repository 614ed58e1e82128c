"""GGUF as a Format: one file, which llama.cpp runs."""

from __future__ import annotations

from quantize.estimate.vram import IN_LLAMA_CPP
from quantize.files.gguf import EXTRA
from quantize.formats.format import CardText, Format, Handover, No, Options, Runs, Way, late
from quantize.formats.gguf.layout import GgufLayout
from quantize.formats.gguf.weights import GgufWeights
from quantize.formats.ways import SERVE
from quantize.runtimes.llama_cpp.kind import LLAMA_CPP
from quantize.runtimes.llama_cpp.probe import LLAMA_CPP_PROBE

PYTHON_LLAMA = """\
from llama_cpp import Llama

model = Llama("{file}")
print(model("The capital of France is", max_tokens=16)["choices"][0]["text"])
"""
OLLAMA = "echo 'FROM ./{file}' > Modelfile && ollama create {name} -f Modelfile && ollama run {name}"


def _ways(options: Options) -> tuple[Way, ...]:
    """Ollama takes no model in several files."""
    ollama = () if options.get("split_size") else (Way("Ollama", "sh", OLLAMA),)
    return (
        Way("llama.cpp", "sh", "llama-server -m {file}", with_towers=" --mmproj {towers}"),
        *ollama,
        Way("llama-cpp-python", "python", PYTHON_LLAMA),
        SERVE,
    )


def _in_vllm(options: Options) -> str | No:
    hint = "use --print llama-server or ollama, or build an awq or gptq variant"
    return No("vLLM's GGUF support is experimental and slow", hint)


def _limits(options: Options) -> tuple[str, ...]:
    """What llama.cpp rounded, what was solved after it, and what the types were chosen for."""
    fitted: tuple[str, ...] = ()
    if options.get("fit"):
        fitted = (
            "The type of each matrix was chosen by what its error costs the model, so that the file fits; `fit.json` "
            "has what every type would have cost, and the measurement against the best map of llama.cpp's own.",
        )
    if not options.get("gptq"):
        return fitted
    return (
        *fitted,
        "Matrices were rounded with error feedback into llama.cpp's types; the token embedding, the output head and "
        "types without a grid of their own are as llama.cpp rounds them."
        if not fitted
        else "Matrices were rounded with error feedback into those types; what was not is as llama.cpp rounds it.",
    )


# A group that the calibration text hardly reads takes up the errors of the others: 0.05 in a fitted file of the demo
# model. No row is worse than llama.cpp's own bytes for it, which the solver sees to.
GAINS_OF_SOLVED = (-0.25, 2.0)
BUILDER = late("quantize.formats.gguf.build:GgufBuilder")
FORMAT = Format(
    name="gguf",
    extra=EXTRA,
    layout=GgufLayout(),
    builder=BUILDER,
    checks=2,
    runtime=LLAMA_CPP,
    reference=late("quantize.formats.gguf.reference:GgufReference"),
    weights=GgufWeights(),
    vram=IN_LLAMA_CPP,
    card=CardText(ways=_ways, limits=_limits),
    handover=Handover(vllm=_in_vllm, llama_cpp_file=True),
    gains=lambda options: GAINS_OF_SOLVED if options.get("gptq") else None,
    runs=(Runs("", "llama.cpp, Ollama, LM Studio", "", "on a CPU, or on any GPU that llama.cpp is compiled for"),),
    probes=(LLAMA_CPP_PROBE,),
    fitter=late("quantize.formats.gguf.fit.answer:GgufFitter"),
    quantization=lambda options: str(options.get("type") or "fitted"),
)
