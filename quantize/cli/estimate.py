"""quantize estimate TARGET"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click

from quantize.build.subjects import ESTIMABLE, EstimateSubject, siblings, subjects
from quantize.cli.common import (
    json_option,
    noted,
    open_cache,
    print_json,
    quiet_option,
    store_option,
    verbose_option,
)
from quantize.cli.progress import console_reporter
from quantize.cli.table import Column, print_table, wide_option
from quantize.errors import UsageError
from quantize.estimate.cards import GraphicsCard, card_of
from quantize.estimate.fit import Fit, FitWord, Workload, advise, judge
from quantize.estimate.vram import (
    CONCURRENCIES,
    CONTEXTS,
    RUNTIMES,
    Estimate,
    EstimateSettings,
    MemoryTable,
    memory_table,
)
from quantize.runtimes.served import KV_BITS
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.machine import detect
from quantize.system.sizes import memory_text
from quantize.targets import find_target

DEFAULT_CONTEXT = 4096
SHORT = {FitWord.FITS: "fits", FitWord.TIGHT: "tight", FitWord.DOES_NOT_FIT: "NO"}


@dataclass(frozen=True)
class _EstimateAnswer:
    """Everything about one subject: the table, and for the case that was asked for the verdict with advice."""

    subject: EstimateSubject
    table: MemoryTable
    card: GraphicsCard | None
    context: int
    concurrency: int
    verdict: Fit | None


@click.command("estimate")
@click.argument("target")
@click.option("--context", type=click.IntRange(min=1), help="Tokens of a sequence.  [default: 2k to 32k]")
@click.option("--concurrency", type=click.IntRange(min=1), help="Sequences at once.  [default: 1, 2, 4 and 8]")
@click.option("--gpu", metavar="NAME", help='The card to fit, such as "RTX 4060 8GB".  [default: this machine\'s]')
@click.option("--vram", metavar="SIZE", help="The card's memory, such as 8GiB; 8G is the same, 8GB is 7.45 GiB.")
@click.option("--kv-bits", type=click.Choice([*KV_BITS]), default="16", show_default=True, help="Of the KV cache.")
@click.option("--runtime", type=click.Choice(RUNTIMES), help="[default: llama.cpp for GGUF, vllm for AWQ and GPTQ]")
@store_option
@wide_option
@json_option
@quiet_option
@verbose_option
def command(
    target: str, context: int | None, concurrency: int | None, gpu: str | None, vram: str | None, kv_bits: str,
    runtime: str | None, store: Store, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Memory that TARGET takes (a recipe by file or name, a checkpoint folder, a GGUF file or an artifact), from
    headers alone.

    Each cell has the expected figure and the safe upper one. `fits`: the upper one is within 90 % of the card; `tight`:
    only the expected one is. How good the figures are: docs/estimates.md.
    """
    card = card_of(gpu, vram) or _own_card()
    with console_reporter(quiet=quiet or as_json) as reporter:
        found = subjects(noted(find_target(target, store, ESTIMABLE)), Workspace(store, open_cache(), reporter))
    others = found if len(found) > 1 else [*found, *siblings(found[0], store)] if found[0].family else found
    answers = [_answer(item, others, card, context, concurrency, KV_BITS[kv_bits], runtime) for item in found]
    if as_json:
        print_json([_as_json(item) for item in answers])
        return
    for item in answers:
        _print(item)


def _own_card() -> GraphicsCard | None:
    gpus = detect().gpus
    return GraphicsCard(gpus[0].name, gpus[0].vram_bytes) if gpus else None


def _answer(
    subject: EstimateSubject, others: Sequence[EstimateSubject], card: GraphicsCard | None, context: int | None,
    concurrency: int | None, kv_type: str, runtime: str | None,
) -> _EstimateAnswer:  # fmt: skip
    longest = subject.shape.max_context
    if context is not None and context > longest:
        raise UsageError(
            f"{subject.name}: {context:,} tokens are more than the model's own context of {longest:,}",
            hint=f"use --context {longest} or less",
        )
    settings = EstimateSettings(runtime or subject.profile.runtime, kv_type)
    table = memory_table(
        subject.shape, subject.weights_bytes, profile=subject.profile, settings=settings,
        contexts=[context] if context else CONTEXTS, concurrencies=[concurrency] if concurrency else CONCURRENCIES,
    )  # fmt: skip
    asked, at_once = context or min(DEFAULT_CONTEXT, longest), concurrency or 1
    verdict = None
    if card is not None:
        variants = {item.name: (item.weights_bytes, item.profile) for item in others if item.name != subject.name}
        workload = Workload(subject.shape, subject.weights_bytes, subject.profile, settings, asked, at_once)
        verdict = advise(workload, card.vram_bytes, variants)
    return _EstimateAnswer(subject, table, card, asked, at_once, verdict)


def _print(item: _EstimateAnswer) -> None:
    subject, table, first = item.subject, item.table, item.table.cells[0]
    click.echo(
        f"{subject.name}: {subject.format} in {table.runtime}, weights {memory_text(table.weights_bytes)}, "
        f"KV cache {table.kv_bytes_per_token / 1024:.1f} KiB a token ({table.kv_type}), RAM for loading "
        f"{memory_text(first.loading_ram_bytes)}, safe {memory_text(first.loading_ram_upper_bytes)}"
    )
    concurrencies = sorted({cell.concurrency for cell in table.cells})
    columns = [
        Column("CONTEXT", "right"),
        *(Column(f"{count} AT ONCE", "right", wraps=True) for count in concurrencies),
    ]
    rows = []
    for context in sorted({cell.context for cell in table.cells}):
        cells = [cell for cell in table.cells if cell.context == context]
        rows.append([f"{context:,}", *(_cell(cell, item.card) for cell in cells)])
    print_table(columns, rows, empty="nothing to estimate")
    if item.card is not None and item.verdict is not None:
        _print_verdict(item, item.card, item.verdict)


def _cell(cell: Estimate, card: GraphicsCard | None) -> str:
    text = f"{cell.expected_bytes / 2**30:.2f} to {memory_text(cell.upper_bytes)}"
    return text if card is None else f"{text} {SHORT[judge(cell, card.vram_bytes).word]}"


def _print_verdict(item: _EstimateAnswer, card: GraphicsCard, verdict: Fit) -> None:
    sequences = "1 sequence" if item.concurrency == 1 else f"{item.concurrency} sequences"
    name = card.name if memory_text(card.vram_bytes) in card.name else f"{card.name}, {memory_text(card.vram_bytes)}"
    click.echo(f"{item.context:,} tokens, {sequences}, {name}: {verdict.word}: {verdict.reason}")
    for suggestion in verdict.suggestions:
        click.echo(f"  try: {suggestion}")
    click.echo()


def _as_json(item: _EstimateAnswer) -> dict[str, Any]:
    subject, table = item.subject, item.table
    return {
        "name": subject.name,
        "format": subject.format,
        "architecture": subject.shape.architecture,
        "runtime": table.runtime,
        "kv_type": table.kv_type,
        "weights_bytes": table.weights_bytes,
        "kv_bytes_per_token": table.kv_bytes_per_token,
        "cells": [
            {**asdict(cell), "verdict": judge(cell, item.card.vram_bytes).word if item.card else None}
            for cell in table.cells
        ],
        "card": {"name": item.card.name, "vram_bytes": item.card.vram_bytes} if item.card else None,
        "asked": {"context": item.context, "concurrency": item.concurrency},
        "verdict": asdict(item.verdict) if item.verdict else None,
    }
