"""quantize calibration show SPEC"""

from __future__ import annotations

from pathlib import Path

import click

from quantize.calibration.text import CalibrationSet, load_calibration_set, load_tokenizer
from quantize.cli.common import json_option, noted, open_cache, open_recipe, print_json, quiet_option, verbose_option
from quantize.cli.progress import console_reporter
from quantize.errors import UsageError
from quantize.model.source import open_source, pin_source
from quantize.recipe.calibration import Calibration, load_calibration
from quantize.recipe.model import Recipe
from quantize.store.store import Store
from quantize.system.lookup import CALIBRATION, find_data
from quantize.targets import RecipeTarget, SpecTarget, find_target


@click.group("calibration")
def command() -> None:
    """Look at calibration text."""


@command.command("show")
@click.argument("spec")
@click.option(
    "--recipe", type=click.Path(path_type=Path), help="Recipe whose model tokenizes; needed unless SPEC is one."
)
@click.option("--sequences", type=click.IntRange(min=0), default=3, show_default=True, help="How many to print.")
@json_option
@quiet_option
@verbose_option
def show(spec: str, recipe: Path | None, sequences: int, as_json: bool, quiet: bool) -> None:
    """Print what the model will really see: counts, the hash, and the first sequences after tokenizing.

    SPEC is a calibration/*.yaml file or the name of one, or a recipe with calibration.
    """
    parsed, text = _recipe(spec, recipe)
    with console_reporter(quiet=quiet or as_json) as reporter:
        cache = open_cache()
        checkpoint = open_source(pin_source(parsed, cache, reporter), cache, reporter)
        found = load_calibration_set(text, parsed.path.parent, checkpoint.folder)
    tokenizer = load_tokenizer(checkpoint.folder)
    texts = [tokenizer.decode(ids) for ids in found.token_ids[:sequences]]
    if as_json:
        print_json({**_facts(found), "parts": [part.model_dump() for part in found.parts], "texts": texts})
        return
    for name, value in _facts(found).items():
        click.echo(f"{name:>13}  {value}")
    for part in found.parts:
        click.echo(f"{part.dataset:>13}  {part.left_out or f'{part.sequences} sequences, {part.tokens:,} tokens'}")
    for number, (ids, text) in enumerate(zip(found.token_ids, texts, strict=False), 1):
        click.echo(f"\n--- sequence {number} of {len(found.token_ids)}, {len(ids)} tokens ---\n{text}")


def _recipe(spec: str, recipe: Path | None) -> tuple[Recipe, Calibration]:
    """A recipe whose model tokenizes, and the text."""
    if recipe is not None:
        found = find_data(spec, Path(), CALIBRATION)
        return open_recipe(recipe), load_calibration(found.path if found else Path(spec))
    target = noted(find_target(spec, Store(), (SpecTarget, RecipeTarget)))
    if isinstance(target, SpecTarget):
        hint = "give the recipe whose model tokenizes: --recipe NAME"
        raise UsageError(f"{spec} is calibration text without a model", hint=hint)
    parsed = open_recipe(target.path)
    if parsed.calibration is None:
        raise UsageError(f"{spec}: the recipe has no calibration", hint="name a calibration/*.yaml file and --recipe")
    return parsed, parsed.calibration


def _facts(found: CalibrationSet) -> dict[str, int | str]:
    return {
        "sequences": len(found.token_ids),
        "tokens": found.tokens,
        "shortest": min(len(ids) for ids in found.token_ids),
        "longest": max(len(ids) for ids in found.token_ids),
        "rows skipped": found.skipped_rows,
        "system folded": found.folded_rows,
        "hash": found.hash,
    }
