"""Holds quantize's memory estimate against what llama.cpp itself logs, and writes docs/estimates.md.

In: nothing; GGUF files of several shapes are made (holes in place of values). Out: a table of points, each with the
model, KV and compute buffers of llama.cpp's log beside the estimate; exit code 1 if one point is off by more than
max(5 %, 100 MiB), or if a safe-upper figure is below the truth. Run it: python benchmarks/estimate_truth.py
"""

from __future__ import annotations

import re
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from random_gguf import SHAPES, metadata_of, tensor_table, write_gguf

from quantize.estimate.vram import MIB, Estimate, EstimateSettings, ModelShape, estimate, repacked_bytes
from quantize.runtimes.llama_cpp.log import keep_log

PAGE = Path(__file__).resolve().parent.parent / "docs" / "estimates.md"
_GGML_TYPES = {"f16": 1, "q4_0": 2, "q8_0": 8}


@dataclass(frozen=True)
class Point:
    """One configuration: a shape, a ggml type, and how a context is opened. context is that of one sequence."""

    shape: str
    kind: str
    context: int
    sequences: int = 1
    ubatch: int = 512
    kv: str = "f16"
    flash: bool = True
    unified: bool = False
    repack: bool = False


@dataclass(frozen=True)
class Truth:
    """Bytes in llama.cpp's log."""

    model: int
    kv: int
    compute: int
    output: int

    @property
    def total(self) -> int:
        """All four."""
        return self.model + self.kv + self.compute + self.output


SMOL, QWEN, LLAMA1, GEMMA = "SmolLM2-135M", "Qwen2.5-0.5B", "Llama-3.2-1B", "Gemma-3-1B"
LLAMA8, MISTRAL = "Llama-3.1-8B, 4 layers", "Mistral-7B, 4 layers"
MOE, LATENT = "Qwen3-MoE, 2 layers", "DeepSeek-V2, narrow, 3 layers"
POINTS = (
    Point(SMOL, "F16", 2048),
    Point(SMOL, "F16", 8192, sequences=4),
    Point(SMOL, "Q8_0", 8192, flash=False),
    Point(SMOL, "Q4_1", 2048, sequences=8, unified=True),
    Point(SMOL, "Q5_0", 8192, ubatch=128, kv="q8_0"),
    Point(QWEN, "Q8_0", 4096),
    Point(QWEN, "Q4_0", 4096, repack=True),
    Point(QWEN, "Q5_1", 32768, kv="q4_0"),
    Point(QWEN, "F16", 8192, sequences=4, ubatch=1024),
    Point(LLAMA1, "Q4_K", 2048),
    Point(LLAMA1, "Q4_K", 2048, repack=True),
    Point(LLAMA1, "Q4_K", 8192, flash=False),
    Point(LLAMA1, "Q6_K", 16384, sequences=2),
    Point(LLAMA1, "Q8_0", 32768, kv="q8_0"),
    Point(LLAMA1, "Q2_K", 4096, sequences=8, unified=True, repack=True),
    Point(GEMMA, "Q4_0", 2048),
    Point(GEMMA, "Q4_0", 8192, sequences=4),
    Point(GEMMA, "Q8_0", 32768, ubatch=256),
    Point(GEMMA, "F16", 8192, sequences=4, unified=True),
    Point(LLAMA8, "Q5_K", 4096),
    Point(LLAMA8, "Q4_K", 32768, sequences=2, kv="q8_0"),
    Point(LLAMA8, "Q3_K", 8192, ubatch=2048),
    Point(LLAMA8, "Q8_0", 16384, flash=False, ubatch=256),
    Point(MISTRAL, "Q4_0", 2048, repack=True),
    Point(MISTRAL, "IQ4_XS", 32768),
    Point(MISTRAL, "Q6_K", 8192, sequences=8),
    Point(MOE, "Q4_K", 8192),
    Point(MOE, "Q8_0", 4096, sequences=4, kv="q8_0"),
    Point(LATENT, "Q4_0", 16384),
    Point(LATENT, "Q8_0", 8192, sequences=2, flash=False),
)


def measure(path: Path, point: Point) -> Truth:
    """Load the file, open a context, read the log. Raises RuntimeError when llama.cpp refuses."""
    import llama_cpp

    log = keep_log(llama_cpp)
    model_params = llama_cpp.llama_model_default_params()
    model_params.use_extra_bufts = point.repack
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
    if not model:
        raise RuntimeError("".join(log)[-2000:])
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max = point.context * point.sequences, point.sequences
    params.n_ubatch, params.n_batch = point.ubatch, max(2048, point.ubatch)
    params.kv_unified, params.swa_full = point.unified, False
    params.flash_attn_type = int(point.flash)
    params.type_k = params.type_v = _GGML_TYPES[point.kv]
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("".join(log)[-2000:])
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return parse_log("".join(log))


def parse_log(log: str) -> Truth:
    """The four kinds of buffers, each summed over devices."""

    def total(pattern: str) -> int:
        return round(sum(float(size) for size in re.findall(pattern, log)) * MIB)

    return Truth(
        model=total(r"model buffer size = +([\d.]+) MiB"),
        kv=total(r"KV buffer size = +([\d.]+) MiB"),
        compute=total(r"sched_reserve: +\S+ compute buffer size = +([\d.]+) MiB"),
        output=total(r"output buffer size = +([\d.]+) MiB"),
    )


def predict(path: Path, point: Point) -> Estimate:
    """What quantize says of the same file before it is loaded."""
    tensors = tensor_table(path)
    tied = all(name != "output.weight" for name, _, _ in tensors)
    return estimate(
        ModelShape.from_gguf(metadata_of(path)),
        sum(size for _, _, size in tensors),
        settings=EstimateSettings(
            kv_type=point.kv,
            device="cpu",
            ubatch=point.ubatch,
            flash_attention=point.flash,
            unified_kv=point.unified,
        ),
        context=point.context,
        concurrency=point.sequences,
        repacked=repacked_bytes(tensors, tied=tied) if point.repack else 0,
    )


def acceptable(truth: Truth, guess: Estimate) -> bool:
    """Within max(5 %, 100 MiB), and the safe-upper figure not below the truth."""
    off = abs(guess.expected_bytes - truth.total)
    return off <= max(truth.total // 20, 100 * MIB) and guess.upper_bytes >= truth.total


def run(folder: Path) -> list[tuple[Point, Truth, Estimate]]:
    """Measure and predict every point; one file is on disk at a time."""
    path = folder / "shape.gguf"
    rows = []
    for point in POINTS:
        write_gguf(path, SHAPES[point.shape], point.kind)
        rows.append((point, measure(path, point), predict(path, point)))
        path.unlink()
    return rows


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f}"


def _row(point: Point, truth: Truth, guess: Estimate) -> str:
    extras = [
        f"micro-batch {point.ubatch}" if point.ubatch != 512 else "",
        f"KV {point.kv}" if point.kv != "f16" else "",
        "" if point.flash else "no flash attention",
        "unified KV" if point.unified else "",
        "repacked" if point.repack else "",
    ]
    off = guess.expected_bytes - truth.total
    cells = (
        point.shape, point.kind, f"{point.context} x {point.sequences}", ", ".join(filter(None, extras)) or "-",
        _mib(truth.model), _mib(truth.kv), _mib(truth.compute + truth.output), _mib(truth.total),
        _mib(guess.expected_bytes), f"{off / MIB:+.0f} ({off / truth.total:+.1%})", _mib(guess.upper_bytes),
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def render(rows: list[tuple[Point, Truth, Estimate]]) -> str:
    """The page."""
    offs = [abs(guess.expected_bytes - truth.total) for _, truth, guess in rows]
    shares = [off / truth.total for off, (_, truth, _) in zip(offs, rows, strict=True)]
    good = sum(acceptable(truth, guess) for _, truth, guess in rows)
    head = (
        "| shape | type | context x sequences | otherwise | model | KV | compute + output | truth | expected | off "
        "| safe upper |\n|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    intro = _INTRO.format(
        version=version("llama-cpp-python"), good=good, points=len(rows),
        off=f"{max(offs) / MIB:.0f} MiB", share=f"{max(shares):.1%}",
    )  # fmt: skip
    return "\n".join((intro, head, *(_row(*row) for row in rows), "", _NOTES, ""))


_INTRO = """# Memory estimates against the truth

Made by `python benchmarks/estimate_truth.py` with llama-cpp-python {version}, on a CPU. {good} of {points} points are
within max(5 %, 100 MiB) with a safe-upper figure that is not below the truth. The largest difference is {off}, the
largest relative one {share} (a small model: 32 MiB for the process are in the estimate, and not in the log).

Truth is the sum of the model, KV, compute and output buffers in llama.cpp's own log. The files have the widths of the
models named, some of them fewer layers, and holes in place of values: buffers do not depend on values. All figures are
MiB. *Repacked*: on an x86 CPU llama.cpp keeps a second, rearranged copy of Q4_0, Q4_K, Q2_K, IQ4_NL and MXFP4 matrices,
so that the model takes up to twice its file; in the other rows that is switched off, as it is on a GPU.
"""

_NOTES = """## What the figures are made of

- **Weights**: the bytes of the tensors, exact.
- **KV cache**: for each layer, values a token x kept tokens x sequences x bytes a value: 2 at f16, 34/32 at q8_0,
  18/32 at q4_0. llama.cpp rounds the context of a sequence up to 256; a sliding-window layer keeps its window and a
  micro-batch, rounded up to 256; latent attention (DeepSeek) keeps one latent and one rotary key a token.
- **Compute buffer**, with u tokens in a micro-batch, all float32, the largest of
  - head: u x vocabulary + 3 u x hidden,
  - feed-forward: u x (3 x intermediate + 4 x hidden) + the mask (a mixture: 2 u x experts used x (width + hidden)),
  - attention: u x (4 x hidden + queries + keys + values) + the mask, and without flash attention also
    heads x u x context.
  The mask is u x context in float16 with flash attention, else in float32; two of them with sliding windows.
- **Safe upper**: weights + 2 %, KV + 3 %, compute buffer for a unified cache + 15 %, and the upper figure for process
  and driver.

## What was not measured

No GPU was at hand. The context that a driver takes on a card (400 to 700 MiB for llama.cpp, 500 to 900 MiB for
transformers, 800 to 1600 MiB for vLLM with its CUDA graphs) and the activations of transformers and vLLM are taken from
their documentation and the shapes of their tensors, not from measurements of ours. They are marked as such in
`quantize/estimate/vram.py`.

## Does it fit?

`fits`: the safe-upper figure is at most 90 % of the card. `tight`: only the expected one is. Else `does not fit`.
7.5 of 8 GB (94 %) therefore counts as not enough: a display, other programs and a fragmented
allocator take the rest."""


def main() -> int:
    """Write the page; 1 if a point is out of bounds."""
    with tempfile.TemporaryDirectory() as folder:
        rows = run(Path(folder))
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(rows), encoding="utf-8")
    bad = [point for point, truth, guess in rows if not acceptable(truth, guess)]
    for point in bad:
        sys.stderr.write(f"out of bounds: {point}\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
