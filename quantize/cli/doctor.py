"""quantize doctor"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import click

from quantize.cli.common import json_option, print_json, store_option, verbose_option
from quantize.cli.diagnosis import Ability, Diagnosis, examine
from quantize.cli.table import Column, print_table, wide_option
from quantize.cli.trials import Trial, TrialState
from quantize.store.store import Store
from quantize.system.cache import default_cache_root
from quantize.system.gpus import LocalGpu
from quantize.system.sizes import memory_text, size_text


@click.command("doctor")
@click.option("--quick", is_flag=True, help="Start no engine: what is installed and broken looks well.")
@store_option
@wide_option
@json_option
@verbose_option
@click.pass_context
def command(context: click.Context, quick: bool, store: Store, as_json: bool) -> None:
    """Show versions, devices, memory, disk, and which formats can be built and served here, with what is missing for
    the others. Runs something tiny in every engine that is installed, each in a process of its own, and says what died
    and the line that repairs it. The exit code is 0 whatever was found; programs read --json.
    """
    report = examine(store.root, default_cache_root(), quick=quick)
    if as_json:
        print_json(_as_json(report))
        return
    machine = report.machine
    facts = [
        ("system", report.system),
        ("processor", f"{report.processor}, {machine.cores} cores"),
        ("memory", f"{memory_text(machine.ram_bytes)}, {memory_text(machine.available_ram_bytes)} available"),
        *(("gpu", _gpu(item, report.driver)) for item in machine.gpus),
        *([] if machine.gpus else [("gpu", "none that the NVIDIA driver knows")]),
        *((f"{name} on", devices) for name, devices in report.devices.items()),
    ]
    for name, value in facts:
        click.echo(f"{name:>14}  {value}")
    rows = [[name, version or "not installed"] for name, version in report.versions.items()]
    print_table([Column("PACKAGE"), Column("VERSION")], rows, empty="")
    rows = [
        [item.what, str(item.path), size_text(item.free_bytes), "yes" if item.writable else "NO"]
        for item in report.folders
    ]
    print_table([Column("FOLDER"), Column("PATH"), Column("FREE", "right"), Column("WRITABLE")], rows, empty="")
    rows = [_row(item) for item in report.abilities]
    columns = [Column("FORMAT"), Column("BUILD"), Column("SERVE"), Column("TO INSTALL")]
    print_table(columns, rows, empty="no formats")
    for text in report.gpu_advice:
        click.echo(f"GPU: {text}\n")
    if report.trials is None:
        click.echo("engines were not started; without --quick something tiny runs in each")
    else:
        _show_trials(report.trials, verbose=bool(context.meta.get("quantize.verbose")))


def _gpu(gpu: LocalGpu, driver: str | None) -> str:
    free = memory_text(gpu.vram_bytes - gpu.used_bytes)
    return f"{gpu.name}, {memory_text(gpu.vram_bytes)}, {free} free, driver {driver or 'of an unknown version'}"


def _show_trials(trials: Sequence[Trial], *, verbose: bool) -> None:
    """A table of all; then, for each that does not work, what happened and what to do, whole lines to copy."""
    rows = [[item.engine, item.state, f"{item.seconds:.1f}", item.ran or "see below"] for item in trials]
    columns = [Column("ENGINE"), Column("STATE"), Column("SECONDS", "right"), Column("RAN")]
    print_table(columns, rows, empty="no engine is installed")
    for item in trials:
        if item.state is not TrialState.WORKS:
            click.echo(f"\n{item.engine} {item.version} {item.state}: {item.problem}\n  {item.repair}")
            if verbose and item.evidence:
                click.echo(item.evidence, err=True)


def _row(item: Ability) -> list[str]:
    build = _word(item.build_lacks, item.build_broken)
    return [item.format, build, _word(item.serve_lacks, item.serve_broken), item.install or ""]


def _word(lacks: tuple[str, ...], broken: tuple[str, ...]) -> str:
    if lacks:
        return f"lacks {', '.join(lacks)}"
    return f"NO: {', '.join(broken)}" if broken else "yes"


def _as_json(report: Diagnosis) -> dict[str, Any]:
    data = dataclasses.asdict(report)
    data["folders"] = [{**item, "path": str(item["path"])} for item in data["folders"]]
    return data
