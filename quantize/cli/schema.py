"""quantize schema recipe|manifest"""

from __future__ import annotations

import click

from quantize.cli.common import print_json, verbose_option


@click.command("schema")
@click.argument("kind", type=click.Choice(["recipe", "manifest"]), default="recipe")
@verbose_option
def command(kind: str) -> None:
    """Print the JSON Schema of recipes (editors complete with it) or of manifest.json."""
    if kind == "manifest":
        from quantize.store.manifest import manifest_schema

        print_json(manifest_schema())
        return
    from quantize.formats import option_models
    from quantize.recipe.model import recipe_schema

    print_json(recipe_schema(option_models()))
