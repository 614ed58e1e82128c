"""quantize doctor"""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from quantize.cache import default_cache_root
from quantize.cli.common import json_option, print_json, print_table, store_option, verbose_option
from quantize.doctor import Ability, Report, examine
from quantize.sizes import memory_text, size_text
from quantize.store import Store


@click.command("doctor")
@store_option
@json_option
@verbose_option
def command(store: Store, as_json: bool) -> None:
    """Show versions, devices, memory, disk, and which formats can be built and served here, with what is missing for
    the others.
    """
    report = examine(store.root, default_cache_root())
    if as_json:
        print_json(_as_json(report))
        return
    machine = report.machine
    facts = [
        ("system", report.system),
        ("processor", f"{report.processor}, {machine.cores} cores"),
        ("memory", f"{memory_text(machine.ram_bytes)}, {memory_text(machine.available_ram_bytes)} available"),
        *(("gpu", f"{item.name}, {memory_text(item.vram_bytes)}") for item in machine.gpus),
        *([] if machine.gpus else [("gpu", "none that nvidia-smi knows")]),
        ("torch on", report.torch),
        ("llama.cpp on", report.llama_cpp),
    ]
    for name, value in facts:
        click.echo(f"{name:>14}  {value}")
    rows = [[name, version or "not installed"] for name, version in report.versions.items()]
    print_table([("PACKAGE", "left"), ("VERSION", "left")], rows, empty="")
    rows = [
        [item.what, str(item.path), size_text(item.free_bytes), "yes" if item.writable else "NO"]
        for item in report.folders
    ]
    print_table([("FOLDER", "left"), ("PATH", "left"), ("FREE", "right"), ("WRITABLE", "left")], rows, empty="")
    rows = [_row(item) for item in report.abilities]
    columns = [("FORMAT", "left"), ("BUILD", "left"), ("SERVE", "left"), ("TO INSTALL", "left")]
    print_table(columns, rows, empty="no formats")


def _row(item: Ability) -> list[str]:
    return [item.format, _word(item.build_lacks), _word(item.serve_lacks), item.install or ""]


def _word(lacks: tuple[str, ...]) -> str:
    return f"lacks {', '.join(lacks)}" if lacks else "yes"


def _as_json(report: Report) -> dict[str, Any]:
    data = dataclasses.asdict(report)
    data["folders"] = [{**item, "path": str(item["path"])} for item in data["folders"]]
    return data
