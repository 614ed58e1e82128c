"""What the templates show: words, numbers with their units, tables and plots; the same for Markdown and HTML.

In: a PageSubject and its Choice. Out: a Page of plain text and SVG. A figure that is not there is shown as "not
measured".
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from quantize.bench.result import BenchResult, Cell
from quantize.charts.comparison import comparison_chart
from quantize.charts.plots import Range, heatmap, ranges
from quantize.evaluate.comparison import answer, comparison_note, comparison_table, front_text
from quantize.evaluate.decision import Finding, GateOutcome, Verdict
from quantize.evaluate.metric import Detail, Metric, Reading
from quantize.evaluate.metrics import cells, golden_count, headings, metrics, readings
from quantize.evaluate.record import source_lines
from quantize.evaluate.task_record import TasksRecord
from quantize.evaluate.task_table import HEADINGS, same_lines, task_rows
from quantize.report.collect import Layer, MeasuredArtifact, PageSubject
from quantize.report.fits import FitView, fit_view
from quantize.report.golden import GoldenView, PromptState, golden_view
from quantize.report.production import Choice, ServingVerdict
from quantize.report.provenance import made, provenance, source_facts
from quantize.report.table import MISSING, Table
from quantize.system.sizes import size_text

TONES: Mapping[StrEnum, str] = {
    Verdict.ACCEPTED: "good", Verdict.FLAGGED: "flag", Verdict.REFUSED: "bad", Verdict.INSUFFICIENT: "open",
    GateOutcome.PASSED: "good", GateOutcome.FLAGGED: "flag", GateOutcome.REFUSED: "bad",
    GateOutcome.INSUFFICIENT: "open",
    PromptState.GAINED: "good", PromptState.LOST: "bad", PromptState.DIFFERS: "open",
}  # fmt: skip
"""The colour of each state, as style.css names it."""
WORST_LAYERS = 3
BLOCK_ORDER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class ArtifactCard:
    """One artifact at a glance. colour: index of its colour in the plots; reason: the first thing to know."""

    variant: str
    ref: str
    format: str
    size: str
    word: Verdict
    tone: str
    reason: str
    colour: int
    risk: str
    benched: bool
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class LayerView:
    """Losses of one artifact: a heat map, and in words."""

    variant: str
    svg: str
    text: str


@dataclass(frozen=True)
class Page:
    """Everything that a page shows."""

    name: str
    title: str
    description: str
    facts: tuple[tuple[str, str], ...]
    cards: tuple[ArtifactCard, ...]
    glance: Table
    answer: str
    front: str
    by_kind: Table
    by_kind_note: str
    quality_plot: str
    quality_note: str
    tasks: Table
    tasks_note: str
    memory: Table
    memory_note: str
    latency: Table
    latency_plots: tuple[str, ...]
    latency_note: str
    layers: tuple[LayerView, ...]
    fits: tuple[FitView, ...]
    golden: GoldenView
    provenance: Table
    choice: Choice
    made: str


def page_of(subject: PageSubject, choice: Choice) -> Page:
    """Put a subject into words, numbers and plots."""
    entries = subject.entries
    return Page(
        name=subject.name,
        title=f"{subject.source.name}, quantized",
        description=subject.description,
        facts=source_facts(subject),
        cards=tuple(_card(verdict, index) for index, verdict in enumerate(choice.verdicts)),
        glance=_glance(choice),
        answer=answer(choice.comparison),
        front=front_text(choice.comparison),
        by_kind=_by_kind(choice),
        by_kind_note=comparison_note(choice.comparison),
        quality_plot=comparison_chart(choice.comparison),
        quality_note=_quality_note(entries),
        tasks=_tasks(entries),
        tasks_note="; ".join(same_lines(_task_records(entries))),
        memory=_memory(entries),
        memory_note=_memory_note(entries),
        latency=_latency(entries),
        latency_plots=_latency_plots(entries),
        latency_note=_latency_note(entries),
        layers=tuple(_layers(entry) for entry in entries if entry.layers),
        fits=tuple(view for view in map(fit_view, entries) if view is not None),
        golden=golden_view(entries),
        provenance=provenance(entries),
        choice=choice,
        made=made(entries),
    )


def _card(verdict: ServingVerdict, index: int) -> ArtifactCard:
    manifest = verdict.entry.artifact.manifest
    risk = manifest.accepted_risk
    return ArtifactCard(
        variant=manifest.variant,
        ref=verdict.entry.artifact.ref,
        format=manifest.format,
        size=size_text(manifest.size_bytes),
        word=verdict.word,
        tone=TONES[verdict.word],
        reason=_first_reason(verdict),
        colour=index,
        risk=risk.reason if risk else "",
        benched=verdict.entry.bench is not None,
        findings=verdict.decision.findings,
    )


def _first_reason(verdict: ServingVerdict) -> str:
    decision = verdict.decision
    for findings in (decision.refusals, decision.missing, decision.flags):
        if findings:
            more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
            return f"{findings[0].gate}: {findings[0].reason}{more}"
    missing = verdict.not_measured
    return f"keeps every limit; not measured: {', '.join(missing)}" if missing else "keeps every limit, all measured"


def _glance(choice: Choice) -> Table:
    shown = metrics(Detail.TABLE)  # the kinds of text have a table of their own
    columns = ("variant", "format", "size", "bits/weight", *headings(shown), "verdict")
    rows = [_source_row(choice.verdicts, shown)]
    for verdict in choice.verdicts:
        manifest, figures = verdict.entry.artifact.manifest, cells(verdict.entry.evaluation, shown, MISSING)
        size, bits = size_text(manifest.size_bytes), f"{manifest.bits_per_weight:.2f}"
        rows.append((manifest.variant, manifest.format, size, bits, *figures, verdict.word.value))
    return Table(columns, tuple(rows))


def _source_row(verdicts: Sequence[ServingVerdict], shown: Sequence[Metric]) -> tuple[str, ...]:
    """The source's own figures: of the first artifact that has each."""
    source = verdicts[0].entry.artifact.manifest.source
    found: dict[str, Reading] = {}
    for evaluation in (item.entry.evaluation for item in verdicts):
        for reading in readings(evaluation, Detail.TABLE) if evaluation is not None else ():
            found.setdefault(reading.metric.key, reading)
    figures = [found[item.key].source_text if item.key in found else MISSING for item in shown]
    bits = f"{8 * source.weights_bytes / source.parameters:.2f}" if source.parameters else ""
    return ("source", "", size_text(source.weights_bytes), bits, *figures, "")


def _by_kind(choice: Choice) -> Table:
    found = comparison_table(choice.comparison)
    return Table(found.columns, found.rows, found.worst)


def _quality_note(entries: Sequence[MeasuredArtifact]) -> str:
    measured = [entry.quality for entry in entries if entry.quality is not None]
    if not measured:
        return "No quality was measured: run `quantize eval`, or build with a version that does."
    quality = measured[0]
    text = f"Held-out text {quality.text_name} (sha256 {quality.text_hash[:12]}…)"
    note = f"{text}, {quality.predictions:,} predicted tokens; each artifact in its own runtime."
    golden = source_lines(("", golden_count(entry.evaluation)) for entry in entries)
    note += "".join(f" {line[0].upper()}{line[1:]}." for line in golden)
    for what, found in (
        ("text", {item.windows_hash for item in measured}),
        ("golden prompts", {entry.golden and entry.golden.hash for entry in entries if entry.quality is not None}),
    ):
        if len(found) > 1:
            note += f" Not all were measured on the same {what}: compare only those that were."
    return note


def _task_records(entries: Sequence[MeasuredArtifact]) -> list[TasksRecord | None]:
    return [None if entry.evaluation is None else entry.evaluation.tasks for entry in entries]


def _tasks(entries: Sequence[MeasuredArtifact]) -> Table:
    records = zip(entries, _task_records(entries), strict=True)
    rows = tuple((entry.variant, *row) for entry, record in records for row in task_rows(record))
    return Table(("variant", *HEADINGS), rows)


def _memory(entries: Sequence[MeasuredArtifact]) -> Table:
    cells: dict[tuple[int, int], dict[str, str]] = {}
    for entry in entries:
        for cell in entry.memory.cells if entry.memory is not None else ():
            key = (cell.context, cell.concurrency)
            text = f"{cell.expected_bytes / 2**30:.2f} – {cell.upper_bytes / 2**30:.2f}"
            cells.setdefault(key, {})[entry.variant] = text
    variants = tuple(entry.variant for entry in entries)
    rows = [
        (f"{context:,} x {sequences}", *(found.get(variant, "") for variant in variants))
        for (context, sequences), found in sorted(cells.items(), key=lambda item: (item[0][1], item[0][0]))
    ]
    if any(entry.bench is not None for entry in entries):
        rows.append(("measured peak", *(_measured_peak(entry.bench) for entry in entries)))
    return Table(("context x sequences", *variants), tuple(rows))


def _measured_peak(bench: BenchResult | None) -> str:
    peak = bench.peak_bytes if bench else None
    return MISSING if peak is None else f"{peak / 2**30:.2f}"


def _memory_note(entries: Sequence[MeasuredArtifact]) -> str:
    runtimes = sorted({entry.memory.runtime for entry in entries if entry.memory is not None})
    note = "Not estimated: the formats are not installed here, or the files can't be read."
    if runtimes:
        how = f"estimated for {', '.join(runtimes)} with the KV cache at 16 bits"
        note = f"GiB on the device, expected – safe upper, {how}."
    benches = [entry.bench for entry in entries if entry.bench is not None and entry.bench.peak_bytes is not None]
    if benches:
        where = "GPU memory" if benches[0].vram else "RAM, on a machine without a GPU"
        note += f" The measured peak is {where}, under the load below."
    return note


def _latency(entries: Sequence[MeasuredArtifact]) -> Table:
    columns = ("variant", "shape (in → out)", "load", "requests", "first token p50", "p95", "latency p50", "p95", "p99")
    rows = [_latency_row(entry.variant, cell) for entry in entries if entry.bench for cell in entry.bench.cells]
    return Table((*columns, "tokens/s", "requests/s", "errors"), tuple(rows))


def _latency_row(variant: str, cell: Cell) -> tuple[str, ...]:
    first, latency = cell.first_token, cell.latency
    prompt = cell.mean_prompt_tokens or cell.prompt_tokens
    output = cell.output_tokens if cell.mean_output_tokens is None else cell.mean_output_tokens
    errors = f"{cell.error_rate:.1%}" + "".join(f", {count} {kind}" for kind, count in cell.errors.items())
    return (
        variant, f"{cell.shape} ({prompt:,.0f} → {output:,.0f})", cell.load.replace("x ", "x"), str(cell.requests),
        _seconds(first.p50 if first else None), _seconds(first.p95 if first else None),
        *(_seconds(getattr(latency, name) if latency else None) for name in ("p50", "p95", "p99")),
        "–" if cell.output_tokens_per_second is None else f"{cell.output_tokens_per_second:,.1f}",
        f"{cell.requests_per_second:,.2f}", errors,
    )  # fmt: skip


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value * 1000:,.0f} ms" if value < 1 else f"{value:,.2f} s"


def _latency_plots(entries: Sequence[MeasuredArtifact]) -> tuple[str, ...]:
    """One plot a shape: a group for each load, in it a line for each artifact."""
    shapes = dict.fromkeys(cell.shape for entry in entries if entry.bench for cell in entry.bench.cells)
    plots = []
    for shape in shapes:
        groups: dict[str, list[Range]] = {}
        for index, entry in enumerate(entries):
            for cell in entry.bench.cells if entry.bench else ():
                if cell.shape == shape and cell.latency is not None:
                    spread = cell.latency
                    item = Range(entry.variant, index, spread.p50, spread.p95, spread.p99)
                    groups.setdefault(_load_name(cell), []).append(item)
        plots.append(ranges(list(groups.items()), title=f"{shape}: p50 (dot) to p95 and p99", y_title="latency, s"))
    return tuple(plot for plot in plots if plot)


def _load_name(cell: Cell) -> str:
    return f"{cell.concurrency} at a time" if cell.rate is None else f"{cell.rate:g} a second"


def _latency_note(entries: Sequence[MeasuredArtifact]) -> str:
    benches = [entry.bench for entry in entries if entry.bench is not None]
    if not benches:
        return "No latency was measured: run `quantize bench ARTIFACT`."
    machines = dict.fromkeys(f"{item.measured_with.processor}, {item.measured_with.cores} cores" for item in benches)
    gpus = dict.fromkeys(gpu for item in benches for gpu in item.measured_with.gpus)
    servers = dict.fromkeys(item.measured_with.server for item in benches)
    missing = [entry.variant for entry in entries if entry.bench is None]
    note = f"{', '.join(servers)} on {'; '.join([*machines, *gpus])}. Times are the client's, warm-up left out."
    return note + (f" Not measured: {', '.join(missing)}." if missing else "")


def _layers(entry: MeasuredArtifact) -> LayerView:
    names = sorted({layer.name for layer in entry.layers}, key=_place_in_block)
    blocks = sorted({layer.block for layer in entry.layers})
    found = {(layer.name, layer.block): layer.loss for layer in entry.layers}
    values = [[found.get((name, block)) for block in blocks] for name in names]
    title = f"rounding loss of each matrix of {entry.variant}, by block"
    svg = heatmap(
        [name.removeprefix("self_attn.").removeprefix("mlp.") for name in names],
        [str(block) for block in blocks],
        values,
        title,
    )
    return LayerView(entry.variant, svg, _layers_text(entry.layers))


def _place_in_block(name: str) -> tuple[int, str]:
    """The order in which a block computes, and by name for what it does not tell."""
    last = name.rpartition(".")[2]
    return (BLOCK_ORDER.index(last) if last in BLOCK_ORDER else len(BLOCK_ORDER), name)


def _layers_text(layers: Sequence[Layer]) -> str:
    worst = sorted(layers, key=lambda layer: -layer.loss)[:WORST_LAYERS]
    text = f"Median {statistics.median([layer.loss for layer in layers]):.2%} of the output's energy; the most in "
    text += ", ".join(f"block {layer.block} {layer.name} ({layer.loss:.2%})" for layer in worst) + "."
    better = [layer.loss / layer.nearest for layer in layers if layer.nearest]
    return text + (
        f" The median matrix keeps {statistics.median(better):.0%} of the loss of rounding alone." if better else ""
    )
