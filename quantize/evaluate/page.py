"""evaluation.md: what an evaluation found, for people.

In: the record that measurements.json keeps. Out: Markdown: the verdict and why, the figures and what they were measured
with, and the golden answers that changed, side by side.
"""

from __future__ import annotations

from quantize.evaluate.metrics import readings
from quantize.evaluate.record import Conversion, EvaluationRecord, GoldenRecord, GradedAnswer, PromptResult, Quality
from quantize.evaluate.task_record import TasksRecord
from quantize.evaluate.task_table import HEADINGS, task_lines, task_rows


def render_page(record: EvaluationRecord, title: str) -> str:
    """The text of evaluation.md; the same record gives the same text."""
    parts = [f"# {title}: {record.verdict}", _findings(record)]
    if record.quality is not None:
        parts += [_figures(record), _measured(record, record.quality)]
    if record.golden is not None:
        parts += [_golden(record.golden)]
    if record.tasks is not None:
        parts += [_tasks(record.tasks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _findings(record: EvaluationRecord) -> str:
    rows = [f"| {item.gate} | {item.outcome} | {_cell(item.reason)} |" for item in record.findings]
    return "\n".join(["| gate | outcome | why |", "|---|---|---|", *rows])


def _figures(record: EvaluationRecord) -> str:
    rows = [f"| {item.title} | {item.text_with_unit} | {item.source_text} |" for item in readings(record)]
    return "\n".join(["## Figures", "", "| what | artifact | source |", "|---|---:|---:|", *rows])


def _measured(record: EvaluationRecord, quality: Quality) -> str:
    machine = record.machine
    lines = [
        f"- artifact: {record.artifact.name}, {record.artifact.format}, in {quality.runtime} "
        f"({quality.runtime_version})",
        f"- source: {record.source.uri}, in {quality.source_runtime} ({quality.source_runtime_version})",
        *_conversion(record.conversion),
        f"- text: {quality.text_name}, {quality.predictions:,} predicted tokens in {quality.windows} windows "
        f"of at most {quality.window_tokens}, sha256 `{quality.text_hash[:16]}…`{_kinds(quality)}",
        "- ± is half the width of the interval that the figure lies in with 95 % confidence, by resampling the windows",
        f"- calibration text: {record.held_out}",
        f"- machine: {machine.processor}, {machine.cores} cores" + "".join(f", {gpu}" for gpu in machine.gpus),
    ]
    return "## Measured with\n\n" + "\n".join(lines)


def _conversion(found: Conversion | None) -> list[str]:
    """What the artifact was compared with, where that is not the source in its own library."""
    if found is None:
        return []
    return [
        f"- compared with the source in 16 bits in {found.runtime}, whose own mean KL divergence from the source in "
        f"{found.source_runtime} is {found.mean_kl:.4f} nats"
    ]


def _kinds(quality: Quality) -> str:
    parts = [f"{item.kind} {item.predictions:,}" for item in quality.kinds]
    return f": {', '.join(parts)}" if parts else ""


def _tasks(found: TasksRecord) -> str:
    rows = [f"| {' | '.join(map(_cell, row))} |" for row in task_rows(found)]
    table = [f"| {' | '.join(HEADINGS)} |", "|---|---|---:|---:|---:|", *rows, ""] if rows else []
    return "\n".join(["## Tasks", "", *table, *(f"- {_cell(line)}" for line in task_lines(found))])


def _golden(golden: GoldenRecord) -> str:
    head = (
        f"## Golden prompts\n\nThe artifact passes {golden.count}, the source passes {golden.count.source}; "
        f"{golden.lost} lost. Context {golden.context:,} tokens."
    )
    return "\n\n".join([head, *(_answers(item) for item in golden.results if item.is_changed)])


def _answers(item: PromptResult) -> str:
    return "\n\n".join(
        [
            f"### {item.change}: {item.key}",
            _quoted(item.prompt),
            "Source:" + _reason(item.source),
            _quoted(item.source.text),
            "Artifact:" + _reason(item.artifact),
            _quoted(item.artifact.text),
        ]
    )


def _reason(answer: GradedAnswer) -> str:
    return "" if answer.passed else f" ({answer.reason})"


def _quoted(text: str) -> str:
    """As a block of code, so that nothing in an answer is taken for markup."""
    return "\n".join(f"    {line}" for line in (text or "(empty)").splitlines())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
