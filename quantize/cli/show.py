"""quantize show ARTIFACT"""

from __future__ import annotations

import dataclasses
import json

import click

from quantize.cli.common import (
    json_option,
    print_json,
    store_option,
    verbose_option,
)
from quantize.cli.table import Column, print_table, wide_option
from quantize.evaluate.metrics import readings
from quantize.evaluate.record import read_record
from quantize.evaluate.task_table import HEADINGS, task_lines, task_rows
from quantize.formats.memory import memory_of
from quantize.store.artifact import Artifact
from quantize.store.fit_facts import read_fit, solved_words
from quantize.store.store import Store
from quantize.system.sizes import memory_text, size_text
from quantize.targets import find_artifact


@click.command("show")
@click.argument("artifact")
@store_option
@wide_option
@json_option
@verbose_option
def command(artifact: str, store: Store, as_json: bool) -> None:
    """Show ARTIFACT (name/variant, name/variant@digest, a digest, or a folder)."""
    found = find_artifact(artifact, store)
    manifest = found.manifest
    if as_json:
        memory = memory_of(found)
        estimate = dataclasses.asdict(memory) if memory is not None else None
        print_json({"manifest": manifest.to_data(), "measurements": found.measurements(), "estimate": estimate})
        return
    click.echo(f"{found.ref}\n{manifest.digest}\n{found.folder}\n")
    before = f" (was {manifest.source.quantized_before} once)" if manifest.source.quantized_before else ""
    facts = [
        ("source", manifest.source.uri + before),
        ("licence", manifest.source.license or "unknown"),
        ("architecture", f"{manifest.source.architecture}, {manifest.source.parameters:,} parameters"),
        ("options", json.dumps(manifest.options, sort_keys=True)),
        ("bits a weight", f"{manifest.bits_per_weight:.4f}"),
        ("build key", manifest.build_key),
        ("tools", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())),
    ]
    if manifest.calibration is not None:
        guided = ", guided" if manifest.calibration.spec.get("guided") else ""
        counted = f"{manifest.calibration.sequences} sequences, {manifest.calibration.tokens:,} tokens{guided}"
        facts.append(("calibration", counted))
    for name, words in (("solved", solved_words(found.measurements())), ("fitted", _fitted(found))):
        if words is not None:
            facts.append((name, words))
    if manifest.device is not None:
        facts.append(("computed on", manifest.device))
    if manifest.accepted_risk is not None:
        facts.append(("risk accepted", f"{manifest.accepted_risk.reason} ({', '.join(manifest.accepted_risk.gates)})"))
    for name, value in facts:
        click.echo(f"{name:>14}  {value}")
    _print_evaluation(found)
    files = [[entry.path, size_text(entry.size_bytes), entry.sha256] for entry in manifest.files]
    print_table(
        [Column("FILE"), Column("SIZE", "right"), Column("SHA256", rank=1, wraps=False)], files, empty="no files"
    )
    memory = memory_of(found)
    rows = [
        [f"{cell.context:,}", str(cell.concurrency), memory_text(cell.expected_bytes), memory_text(cell.upper_bytes)]
        for cell in (memory.cells if memory is not None else ())
    ]
    columns = [
        Column("CONTEXT", "right"),
        Column("SEQUENCES", "right"),
        Column("MEMORY", "right"),
        Column("TO BE SAFE", "right"),
    ]
    print_table(columns, rows, empty="no estimate: the format is not installed here, or its files can't be read")
    reasons: dict[str, int] = {}
    for item in manifest.kept_in_high_precision:
        reasons[f"{item.type}: {item.reason}"] = reasons.get(f"{item.type}: {item.reason}", 0) + 1
    kept = [[str(count), reason] for reason, count in sorted(reasons.items())]
    print_table(
        [Column("TENSORS", "right"), Column("KEPT IN HIGHER PRECISION")], kept, empty="nothing kept in higher precision"
    )
    if manifest.stored is not None:
        click.echo(f"\nstored in {manifest.stored.type}: {manifest.stored.reason}")


def _fitted(artifact: Artifact) -> str | None:
    """What its types were chosen for, and what came of it."""
    facts = read_fit(artifact.measurements())
    return None if facts is None else facts.words


def _print_evaluation(artifact: Artifact) -> None:
    record = read_record(artifact.measurements())
    if record is None:
        click.echo("\nnot evaluated")
        return
    rows = [[item.gate, item.outcome.value, item.reason] for item in record.findings]
    click.echo(f"\n{record.verdict}")
    print_table([Column("GATE"), Column("OUTCOME"), Column("WHY")], rows, empty="no gates")
    quality, machine = record.quality, record.machine
    if quality is None:
        return
    figures = [[item.title, item.text_with_unit, item.source_text] for item in readings(record)]
    print_table([Column("FIGURE"), Column("ARTIFACT", "right"), Column("SOURCE", "right")], figures, empty="no figures")
    tasks = task_rows(record.tasks)
    if tasks:
        columns = [Column(text.upper(), "right" if place > 1 else "left") for place, text in enumerate(HEADINGS)]
        print_table(columns, tasks, empty="no tasks")
    facts = [
        ("measured on", f"{quality.text_name}, {quality.predictions:,} tokens, sha256 {quality.text_hash[:12]}"),
        ("in", f"{quality.runtime} ({quality.runtime_version})"),
        ("source in", f"{quality.source_runtime} ({quality.source_runtime_version})"),
        *(("task" if record.tasks else "", line) for line in task_lines(record.tasks)),
        ("machine", f"{machine.processor}, {machine.cores} cores"),
        ("at", record.evaluated_at),
    ]
    for name, value in facts:
        click.echo(f"{name:>14}  {value}")
