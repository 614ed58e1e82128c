"""quantize list artifacts|recipes|formats"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from quantize.cli.common import (
    json_option,
    print_json,
    quality,
    quality_columns,
    store_option,
    verbose_option,
)
from quantize.cli.table import Column, print_markdown, print_table, wide_option
from quantize.errors import RecipeError
from quantize.evaluate.metric import Detail
from quantize.evaluate.metrics import metrics
from quantize.evaluate.record import source_lines
from quantize.formats.memory import memory_of
from quantize.store.artifact import Artifact
from quantize.store.store import Store
from quantize.system.lookup import PREFIX, RECIPES, builtin_files, local_recipes
from quantize.system.sizes import memory_text, size_text

LISTED_CONTEXT = 4096  # tokens that VRAM is shown at
UNKNOWN = "-"


@click.group("list")
def command() -> None:
    """List artifacts, recipes or formats."""


@command.command("artifacts")
@click.option("--all", "everything", is_flag=True, help="Superseded and refused builds too, not only the current ones.")
@click.option("--markdown", is_flag=True, help="Print a Markdown table, such as for the page of a CI job.")
@store_option
@wide_option
@json_option
@verbose_option
def artifacts(everything: bool, markdown: bool, store: Store, as_json: bool) -> None:
    """List the artifacts in the store: size, bits a weight, VRAM estimate, quality against the source, digest."""
    found = store.artifacts() if everything else store.current_artifacts()
    found += store.refused() if everything else []
    if as_json:
        print_json([_as_json(store, item) for item in found])
    else:
        columns = [
            Column("NAME"),
            Column("VARIANT"),
            Column("FORMAT", rank=6),
            Column("SIZE", "right"),
            Column("BITS/WEIGHT", "right", rank=5),
        ]
        columns += [
            Column("VRAM 4K", "right", rank=3),
            *quality_columns(metrics(Detail.LIST)),
            Column("DIGEST", rank=7),
            Column("BUILT", rank=8),
        ]
        rows = [_row(item) for item in found]
        if everything:
            columns.append(Column("CURRENT"))
            rows = [[*row, "yes" if store.is_current(item) else ""] for row, item in zip(rows, found, strict=True)]
        show = print_markdown if markdown else print_table
        show(columns, rows, empty=f"no artifacts in {store.root}/; see `quantize build`")
        notes = source_lines((item.manifest.name, quality(item).golden) for item in found)
        if notes and markdown:
            click.echo("")  # or the table would take the line in
        for note in notes:
            click.echo(note)
    for item in store.broken():
        click.echo(f"warning: {item.folder}: {item.reason}", err=True)


@command.command("recipes")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True), required=False)
@wide_option
@json_option
@verbose_option
def recipes(folder: Path | None, as_json: bool) -> None:
    """List the recipes in FOLDER, with what each would build; else those in recipes/ and those that come with quantize,
    which are built by name: `quantize build NAME`.
    """
    local = local_recipes(folder or Path(RECIPES))
    builtin = {} if folder is not None else builtin_files(RECIPES)
    rows = [_recipe_row(path, str(path)) for path in local]
    rows += [
        _recipe_row(path, f"{PREFIX}{name}")
        for name, path in builtin.items()
        if not any(path.samefile(other) for other in local)
    ]
    if as_json:
        print_json(rows)
        return
    table = [[row["path"], row["name"], row["model"], row["error"] or ", ".join(row["variants"])] for row in rows]
    columns = [Column("RECIPE"), Column("NAME"), Column("MODEL", rank=1), Column("VARIANTS")]
    print_table(columns, table, empty=f"no recipes in {folder}/")


def _recipe_row(path: Path, shown: str) -> dict[str, Any]:
    from quantize.formats import option_models
    from quantize.recipe.model import load_recipe

    try:
        recipe = load_recipe(path, option_models())
    except RecipeError as exc:
        return {"path": shown, "name": "", "model": "", "variants": [], "error": exc.message.splitlines()[0]}
    model = recipe.source.model if isinstance(recipe.source.model, str) else recipe.source.model.file
    return {
        "path": shown, "name": recipe.name, "model": model, "variants": [item.name for item in recipe.variants],
        "error": None,
    }  # fmt: skip


@command.command("formats")
@wide_option
@json_option
@verbose_option
def list_formats(as_json: bool) -> None:
    """List the formats that can be built, with the options that a recipe may give, and where their artifacts run."""
    from quantize.formats import formats, option_models

    rows: list[dict[str, Any]] = [
        {
            "format": name, "extra": formats()[name].extra, "options": list(model.model_fields),
            "runs": [asdict(item) for item in formats()[name].runs],
        }
        for name, model in option_models().items()
    ]  # fmt: skip
    if as_json:
        print_json(rows)
        return
    columns = [Column("FORMAT"), Column("EXTRA"), Column("OPTIONS")]
    table = [[str(row["format"]), str(row["extra"]), ", ".join(row["options"])] for row in rows]
    print_table(columns, table, empty="no formats")
    click.echo()
    columns = [Column("FORMAT"), Column("KIND"), Column("RUNS IN"), Column("CUDA FROM", "right", rank=1)]
    table = [
        [str(row["format"]), item["kind"] or "all", item["runtimes"], item["capability"], item["remark"]]
        for row in rows for item in row["runs"]
    ]  # fmt: skip
    print_table([*columns, Column("REMARK", rank=2)], table, empty="")


def _row(item: Artifact) -> list[str]:
    manifest = item.manifest
    built = str(item.measurements().get("built_at", ""))[:16].replace("T", " ")
    memory = vram_bytes(item, LISTED_CONTEXT)
    return [
        manifest.name, manifest.variant, manifest.format, size_text(manifest.size_bytes),
        f"{manifest.bits_per_weight:.2f}", UNKNOWN if memory is None else memory_text(memory), *quality(item).cells(),
        manifest.short_digest, built,
    ]  # fmt: skip


def vram_bytes(item: Artifact, context: int) -> int | None:
    """The expected estimate for one sequence at the largest context in the table up to `context`; None: not known."""
    table = memory_of(item)
    return None if table is None else table.up_to(context).expected_bytes


def _as_json(store: Store, item: Artifact) -> dict[str, Any]:
    manifest = item.manifest
    return {
        "name": manifest.name,
        "variant": manifest.variant,
        "format": manifest.format,
        "size_bytes": manifest.size_bytes,
        "bits_per_weight": manifest.bits_per_weight,
        "vram_bytes": vram_bytes(item, LISTED_CONTEXT),
        "evaluation": quality(item).as_json(),
        "digest": manifest.digest,
        "current": store.is_current(item),
        "built_at": item.measurements().get("built_at"),
        "folder": str(item.folder),
        "files": [entry.model_dump() for entry in manifest.files],
    }
