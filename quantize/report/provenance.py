"""Where everything on a page comes from: source, files, tools, text, machines.

In: entries. Out: facts about the source, and a table with a column for each artifact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quantize import __version__
from quantize.report.collect import MeasuredArtifact, PageSubject
from quantize.report.table import Table

SHORT = 12


def source_facts(subject: PageSubject) -> tuple[tuple[str, str], ...]:
    """Name and value of what there is to say about the source."""
    source = subject.source
    facts = [("model", source.uri)]
    if source.revision:
        facts.append(("revision", source.revision))
    if source.base_model:
        facts.append(("base model", source.base_model))
    facts.append(("architecture", f"{source.architecture}, {source.parameters:,} parameters"))
    facts.append(("licence", source.license or "unknown"))
    if source.quantized_before:
        before = f"its weights come from a {source.quantized_before} file: nothing here can be better than that"
        facts.append(("quantized before", before))
    return tuple(facts)


def made(entries: Sequence[MeasuredArtifact]) -> str:
    """What made the page, and from when its figures are; not when it was made: the same figures give the same page."""
    dates = [str(entry.measurements.get("built_at", "")) for entry in entries]
    dates += [entry.evaluation.evaluated_at for entry in entries if entry.evaluation is not None]
    dates += [entry.bench.measured_at for entry in entries if entry.bench is not None]
    days = sorted({date[:10] for date in dates if date})
    when = f" from figures of {days[0]}" + (f" to {days[-1]}" if len(days) > 1 else "") if days else ""
    return f"Made by quantize {__version__}{when}."


def provenance(entries: Sequence[MeasuredArtifact]) -> Table:
    """One row a fact, one column an artifact."""
    rows: list[tuple[str, Callable[[MeasuredArtifact], str]]] = [
        ("digest", lambda entry: entry.artifact.manifest.short_digest),
        ("build key", lambda entry: entry.artifact.manifest.build_key[:SHORT]),
        ("options", lambda entry: _options(entry)),
        ("weights", _files),
        ("calibration", _calibration),
        ("tools", lambda entry: _pairs(entry.artifact.manifest.tools)),
        ("computed on", lambda entry: entry.artifact.manifest.device or "–"),
        ("built", _built),
        ("quality measured with", _evaluated),
        ("held-out text", _text),
        ("load measured with", _benched),
    ]
    body = tuple((name, *(cell(entry) for entry in entries)) for name, cell in rows)
    return Table(("", *(entry.variant for entry in entries)), body)


def _options(entry: MeasuredArtifact) -> str:
    options = entry.artifact.manifest.format_options
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in options.items() if value not in (None, {}, []))


def _files(entry: MeasuredArtifact) -> str:
    files = sorted(entry.artifact.manifest.files, key=lambda item: -item.size_bytes)[:1]
    return ", ".join(f"{item.path}, {item.size_bytes:,} bytes, sha256 {item.sha256[:SHORT]}…" for item in files)


def _calibration(entry: MeasuredArtifact) -> str:
    seen = entry.artifact.manifest.calibration
    return f"{seen.sequences} sequences, {seen.tokens:,} tokens, sha256 {seen.hash[:SHORT]}…" if seen else "none"


def _built(entry: MeasuredArtifact) -> str:
    made = entry.measurements
    machine = made.get("machine")
    where = f", {machine.get('system', '')} {machine.get('processor', '')}" if isinstance(machine, Mapping) else ""
    return f"{made.get('built_at', 'unknown')}, {made.get('build_seconds', '?')} s{where}"


def _evaluated(entry: MeasuredArtifact) -> str:
    record, quality = entry.evaluation, entry.quality
    if record is None or quality is None:
        return "not measured"
    machine = record.machine
    source = f"the source in {quality.source_runtime} ({quality.source_runtime_version})"
    where = f"on {machine.processor}, {machine.cores} cores"
    return f"{quality.runtime} ({quality.runtime_version}), {source}, {where}"


def _text(entry: MeasuredArtifact) -> str:
    quality = entry.quality
    if quality is None:
        return "not measured"
    windows = f"{quality.windows} windows of {quality.window_tokens} tokens"
    return f"{quality.text_name}, {windows}, sha256 {quality.text_hash[:SHORT]}…"


def _benched(entry: MeasuredArtifact) -> str:
    if entry.bench is None:
        return "not measured"
    used = entry.bench.measured_with
    parts = [used.server, _pairs(used.runtime), used.machine, used.system]
    parts += [f"context {used.context:,}"] if used.context else []
    return ", ".join(part for part in (*parts, entry.bench.measured_at) if part)


def _pairs(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
