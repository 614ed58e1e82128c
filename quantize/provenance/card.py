"""The model card of an artifact: README.md with the metadata that the Hugging Face Hub reads.

In: a manifest, and what was measured where the card is to say so. Out: Markdown. A build renders it from the manifest
alone, publishing with the figures; it is not part of what the digest pins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from quantize.bench.page import cell_text
from quantize.charts.comparison import comparison_file
from quantize.evaluate.comparison import (
    Comparison,
    answer,
    comparison_note,
    comparison_table,
    front_text,
    read_comparison,
)
from quantize.evaluate.metrics import Summary, readings
from quantize.evaluate.record import EvaluationRecord
from quantize.evaluate.task_table import task_lines, task_rows
from quantize.files.gguf import TOWERS_START
from quantize.formats import known_format
from quantize.model.towers import APART, TEXT_ALONE
from quantize.provenance.licence import Licence, licence_of
from quantize.store.fit_facts import read_fit, solved_words
from quantize.store.manifest import CHART_NAME, Manifest

REASONS_SHOWN = 8
CAUSAL, LARGER = "AutoModelForCausalLM", "AutoModelForMultimodalLM"  # of a model that reads more than text


def render_card(
    manifest: Manifest,
    measurements: Mapping[str, Any] | None = None,
    licence: Licence | None = None,
    remark: str = "",
) -> str:
    """README.md of an artifact, front matter included; the same arguments give the same text.

    measurements: None leaves out what was measured, {} says that nothing was. licence: None takes the manifest's.
    remark: what whoever publishes it has to say first.
    """
    licence = licence or licence_of(manifest)
    title = f"# {manifest.source.name} {manifest.variant}"
    summary = None if measurements is None else Summary.of(measurements)
    record = None if summary is None else summary.record
    parts = [_front_matter(manifest, licence), title, remark, _summary(manifest)]
    if summary is not None:
        parts.append(_verdict(manifest, summary))
    parts += [_obligations(licence), _files(manifest)]
    if record is not None:
        parts.append(_measured(record))
    compared = None if measurements is None else read_comparison(measurements)
    if compared is not None:
        parts.append(_compared(manifest, compared))
    if measurements is not None:
        parts.append(_choices(measurements))
    parts += [_usage(manifest), _limits(manifest, record), _kept(manifest), _left_out(manifest), _provenance(manifest)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _choices(measurements: Mapping[str, Any]) -> str:
    """What its types were chosen for, with bytes against predicted loss, and how many matrices were solved."""
    fitted, solved = read_fit(measurements), solved_words(measurements)
    parts = [f"Error feedback: {solved}."] if solved is not None else []
    if fitted is not None:
        rows = [f"| {_cell(name)} | {size:,} | {loss:.4g} |" for size, loss, name in fitted.rows]
        head = [f"| types | bytes | predicted loss, {fitted.unit_words} |", "|---|---:|---:|"]
        parts += [fitted.words, "\n".join([*head, *rows])]
    return "\n\n".join(["## Types", *parts]) if parts else ""


def _front_matter(manifest: Manifest, licence: Licence | None) -> str:
    data: dict[str, object] = {"pipeline_tag": "text-generation", "tags": [manifest.format, "quantize"]}
    library = known_format(manifest.format).layout.library
    if library is not None:
        data["library_name"] = library
    if manifest.source.base_model:
        data |= {"base_model": manifest.source.base_model, "base_model_relation": "quantized"}
    if licence is not None:
        data |= licence.hub_metadata(entry.path for entry in manifest.files)
    return f"---\n{yaml.safe_dump(data, sort_keys=True, allow_unicode=True)}---"


def _summary(manifest: Manifest) -> str:
    lines = [
        f"{manifest.source.name}, quantized to **{manifest.variant}** ({manifest.format}, "
        f"{manifest.bits_per_weight:.2f} bits per weight, {manifest.size_bytes / 1e6:,.1f} MB)."
    ]
    risk = manifest.accepted_risk
    if risk is not None:
        lines.append(f"**Refused by its gates ({', '.join(risk.gates)}) and taken all the same:** {risk.reason}")
    return "\n\n".join(lines)


def _verdict(manifest: Manifest, summary: Summary) -> str:
    """What has to be known before anything else, where the artifact has not simply passed its gates."""
    if summary.record is None:
        return "**Not evaluated:** nothing is known of what the quantization cost this model."
    if summary.verdict.is_accepted or manifest.accepted_risk is not None:
        return ""
    decision = summary.record.decision
    wanting = (*decision.refusals, *decision.missing)
    reasons = [f"- {item.gate}: {item.reason}" for item in decision.findings if item in wanting]
    return "\n".join([f"**Its gates say: {summary.verdict}.**", "", *reasons])


def _obligations(licence: Licence | None) -> str:
    rule = licence.rule if licence is not None else None
    if rule is None:
        return ""
    return "\n\n".join(text for text in (rule.display and f"**{rule.display}**", rule.notice) if text)


def _files(manifest: Manifest) -> str:
    rows = [f"| {item.path} | {item.size_bytes:,} | `{item.sha256[:16]}…` |" for item in manifest.files]
    return "\n".join(["| file | bytes | sha256 |", "|---|---:|---|", *rows])


def _measured(record: EvaluationRecord) -> str:
    quality = record.quality
    if quality is None:
        return ""
    rows = [f"| {item.title} | {item.text_with_unit} | {item.source_text} |" for item in readings(record)]
    rows.append(f"| gates | {record.verdict} | |")
    how = (
        f"On {quality.predictions:,} tokens of {quality.text_name} (sha256 `{quality.text_hash[:16]}…`), in "
        f"{quality.runtime} {quality.runtime_version}, against the base model in {quality.source_runtime} "
        f"{quality.source_runtime_version}."
    )
    figures = ["## Measured", "", "| what | this model | base model |", "|---|---:|---:|", *rows, "", how]
    return "\n".join([*figures, *_tasks(record)])


def _tasks(record: EvaluationRecord) -> list[str]:
    rows = [f"| {' | '.join(map(_cell, row))} |" for row in task_rows(record.tasks)]
    if not rows:
        return []
    columns = "| task | metric | this model | base model | difference |"
    lines = [f"- {_cell(text)}" for text in task_lines(record.tasks)]
    return ["", "### Tasks", "", columns, "|---|---|---:|---:|---:|", *rows, "", *lines]


def _compared(manifest: Manifest, found: Comparison) -> str:
    """The other variants of the recipe: the chart beside this card, which one to take, and a table."""
    table = comparison_table(found)
    rows = []
    for row, cells in enumerate(table.rows):
        texts = [_cell(text, bold=(row, column) in table.worst) for column, text in enumerate(cells)]
        if found.artifacts[row].digest == manifest.digest:
            texts[0] = f"{_cell(cells[0], bold=True)} (this one)"
        rows.append(f"| {' | '.join(texts)} |")
    sides = "|".join("---:" if 0 < place < len(table.columns) - 2 else "---" for place in range(len(table.columns)))
    chart = comparison_file(found, manifest.source.name)
    variants = f"{len(found.measured)} variants of {manifest.source.name}"
    parts = [
        "## Compared",
        f"![Size against KL divergence of {variants}; the table below has the figures]({CHART_NAME})" if chart else "",
        _cell(" ".join(filter(None, (answer(found), front_text(found))))),
        "\n".join([f"| {' | '.join(map(_cell, table.columns))} |", f"|{sides}|", *rows]),
        comparison_note(found),
    ]
    return "\n\n".join(part for part in parts if part)


def _cell(text: str, *, bold: bool = False) -> str:
    return f"**{cell_text(text)}**" if bold else cell_text(text)


def _usage(manifest: Manifest) -> str:
    kind = known_format(manifest.format)
    ways = kind.card.ways(manifest.options)
    main = kind.layout.main_name(entry.path for entry in manifest.files) or ""
    towers = next((item.path for item in manifest.files if item.path.startswith(TOWERS_START)), "")
    name = f"{manifest.name}-{manifest.variant}".lower()
    known = {"{file}": main, "{name}": name, "{class}": LARGER if _has_towers(manifest) else CAUSAL,
             "{towers}": towers}  # fmt: skip
    blocks = []
    for way in ways:
        how = way.how + (way.with_towers if towers else "")
        for word, value in known.items():
            how = how.replace(word, value)
        blocks.append(f"{way.runtime}:\n\n```{way.language}\n{how.rstrip()}\n```")
    return "\n\n".join(["## Run it\n\nFrom the folder of these files.", *blocks]) if blocks else ""


def _has_towers(manifest: Manifest) -> bool:
    """Whether parts of the model that text does not pass were carried over."""
    return any(item.reason.startswith(APART) for item in manifest.kept_in_high_precision)


def _limits(manifest: Manifest, record: EvaluationRecord | None) -> str:
    lines = []
    if manifest.source.quantized_before:
        before = f"its weights were {manifest.source.quantized_before} and were dequantized to 16 bits"
        lines.append(f"The source was quantized before: {before}. They can't be better than they were.")
    if manifest.stored is not None:
        lines.append(f"What is not quantized is stored in {manifest.stored.type}: {manifest.stored.reason}.")
    if _has_towers(manifest):
        lines.append(f"The model reads more than text: {TEXT_ALONE}, and nothing was measured of them.")
    lines += known_format(manifest.format).card.limits(manifest.options)
    if manifest.calibration is not None:
        text = ", ".join(manifest.calibration.names)
        lines.append(f"Scales and rounding were chosen on {text}; text of another kind or language may lose more.")
    if record is not None:
        lines += [f"{item.gate}: {item.reason}" for item in record.decision.flags]
    if record is not None and record.quality is not None:
        window = record.quality.window_tokens
        lines.append(f"Perplexity and KL divergence were measured in windows of {window:,} tokens, not beyond.")
    lines.append("What the base model does wrong, this one does no better. Nothing was measured of safety.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _kept(manifest: Manifest) -> str:
    reasons: dict[str, int] = {}
    for item in manifest.kept_in_high_precision:
        key = f"{item.type}: {item.reason}"
        reasons[key] = reasons.get(key, 0) + 1
    if not reasons:
        return ""
    rows = [f"- {count} tensors in {reason}" for reason, count in sorted(reasons.items())[:REASONS_SHOWN]]
    return "## Kept in higher precision\n\n" + "\n".join(rows)


def _left_out(manifest: Manifest) -> str:
    reasons: dict[str, int] = {}
    for item in manifest.left_out:
        reasons[item.reason] = reasons.get(item.reason, 0) + 1
    rows = [f"- {count} tensors of the source: {reason}" for reason, count in sorted(reasons.items())]
    return "## Left out\n\n" + "\n".join(rows) if rows else ""


def _provenance(manifest: Manifest) -> str:
    lines = [f"- source: `{manifest.source.uri}`", *(f"- {said}" for said in manifest.source.mended)]
    if manifest.calibration is not None:
        entry = manifest.calibration
        lines.append(f"- calibration: {entry.sequences} sequences, {entry.tokens:,} tokens, hash `{entry.hash[:16]}…`")
    lines += [
        f"- digest: `{manifest.digest}`",
        f"- build key: `{manifest.build_key}`",
        *(f"- {name} {version}" for name, version in manifest.tools.items()),
        *([f"- computed on {manifest.device}"] if manifest.device else []),
    ]
    return "## Made from\n\n" + "\n".join(lines)
