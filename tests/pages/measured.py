"""Measurements as evaluation, calibration and bench write them, with figures that a test chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantize.bench.client import Sample
from quantize.bench.load import summarize
from quantize.bench.prompts import Shape
from quantize.bench.result import BenchResult, MemoryUse, With
from quantize.evaluate.answers import change
from quantize.evaluate.decision import GateThresholds
from quantize.evaluate.gates import decide
from quantize.evaluate.job import Evaluation
from quantize.evaluate.record import (
    ArtifactName,
    Conversion,
    EvaluationRecord,
    Evidence,
    GoldenRecord,
    GradedAnswer,
    Interval,
    KindFigures,
    MeasuredOn,
    PromptResult,
    Quality,
    SourceName,
)
from quantize.evaluate.session import evidence
from quantize.store.artifact import Artifact, update_measurements
from quantize.store.store import Store

HOSTILE = '</p><script>document.title = "taken"</script><img src="http://192.0.2.1/x.png"> | `a` **b** {{ 7 * 7 }} &amp'


def prompt(
    number: int, *, source: bool = True, artifact: bool = True, kind: str = "contains", text: str = ""
) -> PromptResult:
    """One golden prompt; `text` is what the artifact answers."""
    no, text = "says no Paris", text or f"The answer to {number} is paris, Texas."
    return PromptResult(
        key=f"facts/{number}", category="facts", language="en", kind=kind, prompt=f"Question {number}?",
        change=change(source=source, artifact=artifact),
        source=GradedAnswer(text=f"The answer to {number} is Paris.", passed=source, reason="" if source else no),
        artifact=GradedAnswer(text=text, passed=artifact, reason="" if artifact else no),
    )  # fmt: skip


def evaluation(
    *, kl: float = 0.004, ratio: float = 1.004, prompts: Sequence[PromptResult] = (), kinds: Sequence[str] = (),
) -> Evaluation:  # fmt: skip
    """An evaluation with these figures; ten prompts that pass on both sides unless others are given.

    kinds: of text, each with a little more KL divergence than the one before; with any, there are intervals too.
    """
    each = tuple(
        KindFigures(kind=kind, **_figures(kl * (1 + index / 10), ratio, predictions=1000, windows=8))
        for index, kind in enumerate(kinds)
    )
    quality = Quality(
        **_figures(kl, ratio, predictions=12_345, windows=40, sure=not kinds), window_tokens=512, kl_is_exact=False,
        text_name="python-docs", text_hash="ab" * 32, windows_hash="cd" * 32, runtime="llama.cpp",
        runtime_version="0.3.36", source_runtime="transformers", source_runtime_version="5.23.0", kinds=each,
    )  # fmt: skip
    asked = tuple(prompts) or (*(prompt(n) for n in range(9)), prompt(9, kind="json"))
    golden = GoldenRecord.of(asked, "ef" * 32, 2048)
    return Evaluation(quality, golden, {"chat template kept": ""}, "other text", _conversion() if kinds else None)


def _figures(kl: float, ratio: float, *, predictions: int, windows: int, sure: bool = False) -> dict[str, Any]:
    """Fields of TextFigures. sure: without intervals, as a single window has none."""
    return {
        "perplexity": 10.36 * ratio, "source_perplexity": 10.36, "perplexity_ratio": ratio, "mean_kl": kl,
        "p99_kl": 5 * kl, "max_kl": 20 * kl, "top_token_agreement": 0.95, "predictions": predictions,
        "windows": windows,
        "mean_kl_interval": None if sure else Interval(low=kl * 0.9, high=kl * 1.1),
        "perplexity_ratio_interval": None if sure else Interval(low=ratio - 0.001, high=ratio + 0.001),
    }  # fmt: skip


def _conversion() -> Conversion:
    figures = _figures(0.003, 1.001, predictions=12_345, windows=40)
    return Conversion(**figures, runtime="llama.cpp", source_runtime="transformers")


def bench(*, latency: float = 0.5, errors: int = 0, peak: int = 400 << 20) -> BenchResult:
    """A bench run with one shape at one and four requests at a time; each answer took `latency` seconds."""
    samples = [
        Sample(
            float(n),
            answering=True,
            streamed=True,
            first_token=n + 0.1,
            last_token=n + latency,
            ended=n + latency,
            chunks=8,
        )
        for n in range(20)
    ]
    for sample in samples[:errors]:
        sample.error = "dropped"
    shape = Shape("short", 64, 8)
    use = MemoryUse(scope="process", before_load_bytes=200 << 20, after_warm_up_bytes=300 << 20, peak_bytes=peak)
    used = With(
        server="llama_cpp.server", model="tiny.gguf", runtime={"llama-cpp-python": "0.3.36"}, context=512, threads=2,
        processor="A processor", cores=2, ram_bytes=8 << 30, gpus=[], system="Linux x86_64", client="httpx2 2.16.2",
    )  # fmt: skip
    cells = [summarize(shape, samples, concurrency=number, rate=None) for number in (1, 4)]
    return BenchResult(
        measured_at="2026-11-21T10:00:00+00:00", api="openai", loop="closed", timeout_seconds=60, warm_up_requests=5,
        requests_per_cell=20, max_seconds_per_cell=60, seed=0, prompts_hash="12" * 32, tokens_counted_by="chunks",
        ready_seconds=1.0, cells=cells, ram=use, vram=None, measured_with=used,
    )  # fmt: skip


def decided(
    measured: Evidence,
    limits: GateThresholds,
    *,
    artifact: str = "a/b",
    source: str = "m",
) -> EvaluationRecord:
    """The record of what was measured, and of the decision on it."""
    decision = decide(measured, limits)
    return EvaluationRecord(
        quality=measured.quality, conversion=measured.conversion, golden=measured.golden, figures=measured.figures,
        verdict=decision.verdict,
        findings=decision.findings, limits=limits, held_out="other text",
        artifact=ArtifactName(name=artifact, format="gguf"), source=SourceName(name=source, uri=f"local:{source}"),
        machine=MeasuredOn(processor="A processor", cores=2, gpus=()),
    )  # fmt: skip


def keep(
    store: Store, artifact: Artifact, *, found: Evaluation | None = None, load: BenchResult | None = None,
    limits: GateThresholds | None = None, layers: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Put what was measured where the build and the bench put it."""
    changes: dict[str, Any] = {}
    if found is not None:
        manifest = artifact.manifest
        limits = limits or GateThresholds(max_size_ratio=1.1)  # as the gates have it for a 16-bit file
        measured = evidence(found, size_bytes=manifest.weights_bytes, source_bytes=manifest.source.weights_bytes)
        record = decided(measured, limits, artifact=f"{manifest.name}/{manifest.variant}", source=manifest.source.name)
        changes["evaluation"] = record.to_data()
    if load is not None:
        changes["bench"] = load.model_dump(mode="json")
    if layers is not None:
        changes["layers"] = layers
    update_measurements(store.root, artifact, changes)


def layers(blocks: int = 4) -> dict[str, dict[str, float]]:
    """Losses of layers, as the calibrated formats report them."""
    names = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    return {
        f"model.layers.{block}.{name}": {
            "loss": 0.001 * (block + place + 1),
            "nearest_loss": 0.004 * (block + place + 1),
        }
        for block in range(blocks)
        for place, name in enumerate(names)
    }
