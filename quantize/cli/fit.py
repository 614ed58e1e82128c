"""quantize fit RECIPE"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from quantize.build.fitting import Answered, answer_fit
from quantize.build.plan import make_plan
from quantize.cli.common import (
    json_option,
    open_cache,
    open_recipe,
    print_json,
    quiet_option,
    store_option,
    verbose_option,
)
from quantize.cli.progress import console_reporter
from quantize.cli.table import Column, print_table, wide_option
from quantize.formats.base import RunLimits
from quantize.formats.format import CurvePoint
from quantize.runtimes.served import KV_BITS
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.sizes import size_text


@click.command("fit")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--gpu", metavar="NAME", help='The card to fit, such as "RTX 4060 8GB".')
@click.option("--vram", metavar="SIZE", help="The card's memory, such as 8GiB.")
@click.option("--context", type=click.IntRange(min=1), help="Tokens of a sequence on the card.  [default: 4096]")
@click.option("--concurrency", type=click.IntRange(min=1), help="Sequences at once on the card.  [default: 1]")
@click.option("--kv-bits", type=click.Choice([*KV_BITS]), help="Of the KV cache on the card.  [default: 16]")
@click.option("--size", metavar="SIZE", help="Of the model file, such as 2.2G, instead of a card.")
@click.option("--bits", type=float, help="A weight, over all tensors, instead of a card.")
@store_option
@wide_option
@json_option
@quiet_option
@verbose_option
def command(
    recipe: Path, gpu: str | None, vram: str | None, context: int | None, concurrency: int | None, kv_bits: str | None,
    size: str | None, bits: float | None, store: Store, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """What should be built of RECIPE, a file or a name, so that it fits a card, a size or bits a weight.

    Builds nothing. Without options, the recipe's own variants with `fit` are asked about. What types cost is known once
    a variant with `fit` was built; before that, the budget and the type maps of llama.cpp's own within it.
    """
    asked: dict[str, Any] = {
        "gpu": gpu, "vram": vram, "context": context, "concurrency": concurrency, "size": size, "bits": bits,
        "kv": None if kv_bits is None else KV_BITS[kv_bits],
    }  # fmt: skip
    parsed = open_recipe(recipe)
    with console_reporter(quiet=quiet or as_json) as reporter:
        workspace = Workspace(store, open_cache(), reporter)
        plan = make_plan(parsed, workspace)
        wanted = {key: value for key, value in asked.items() if value is not None}
        found = answer_fit(plan, wanted, workspace, RunLimits())
    if as_json:
        print_json([asdict(item) for item in found])
        return
    for item in found:
        _print(item)


def _print(item: Answered) -> None:
    answer = item.answer
    click.echo(f"{item.name}: {answer.words}")
    click.echo(f"budget  {answer.budget_bytes:,} bytes of the model file; the smallest has {answer.least_bytes:,}")
    points = [*answer.stock, *([answer.best] if answer.best is not None else [])]
    columns = [Column("TYPES"), Column("SIZE", "right"), Column("BYTES", "right", rank=2), Column("LOSS", "right")]
    rows = [_row(point, answer.budget_bytes) for point in sorted(points, key=lambda point: point.bytes)]
    print_table([*columns, Column("")], rows, empty="nothing is known")
    click.echo(f"losses  {answer.basis}")
    if answer.best is not None:
        click.echo(f"types   {', '.join(f'{count} {kind}' for kind, count in answer.types.items())}")
        click.echo(f"build   - {answer.written}")


def _row(point: CurvePoint, budget: int) -> list[str]:
    loss = "" if point.loss is None else f"{point.loss:.4g}"
    return [point.name, size_text(point.bytes), f"{point.bytes:,}", loss, "" if point.bytes <= budget else "too large"]

