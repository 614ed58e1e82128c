"""The output formats: one folder each, found through the entry-point group `quantize.formats`, built-in or not."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from quantize.errors import UsageError
from quantize.formats.base import Builder
from quantize.recipe.model import FormatOptions

GROUP = "quantize.formats"


@cache
def builders() -> dict[str, Builder]:
    """All installed builders by name. Raises UsageError if a plugin can't be loaded or two share a name."""
    found: dict[str, Builder] = {}
    # what two installations name, as after a change of the distribution's name, is one plugin
    points = {(item.name, item.value): item for item in entry_points(group=GROUP)}
    for _, point in sorted(points.items()):
        try:
            builder = point.load()()
        except Exception as exc:
            hint = f"update or uninstall {point.dist.name if point.dist else 'the package that brings it'}"
            raise UsageError(f"the format plugin {point.name!r} can't be loaded: {exc}", hint=hint) from exc
        if builder.name in found:
            raise UsageError(f"two plugins bring the format {builder.name!r}", hint="uninstall one of them")
        found[builder.name] = builder
    return found


def option_models() -> dict[str, type[FormatOptions]]:
    """The options model of every installed format: what a recipe may say about it."""
    return {name: builder.Options for name, builder in builders().items()}
