"""The output formats: one folder each, found through the entry-point group `quantize.formats`, built-in or not."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from quantize.errors import UsageError
from quantize.formats.base import Backend
from quantize.recipe.model import BackendOptions

GROUP = "quantize.formats"


@cache
def backends() -> dict[str, Backend]:
    """All installed backends by name. Raises UsageError if a plugin can't be loaded or two share a name."""
    found: dict[str, Backend] = {}
    # what two installations name, as after a change of the distribution's name, is one plugin
    points = {(item.name, item.value): item for item in entry_points(group=GROUP)}
    for _, point in sorted(points.items()):
        try:
            backend = point.load()()
        except Exception as exc:
            hint = f"update or uninstall {point.dist.name if point.dist else 'the package that brings it'}"
            raise UsageError(f"the format plugin {point.name!r} can't be loaded: {exc}", hint=hint) from exc
        if backend.name in found:
            raise UsageError(f"two plugins bring the format {backend.name!r}", hint="uninstall one of them")
        found[backend.name] = backend
    return found


def formats() -> dict[str, type[BackendOptions]]:
    """The options model of every installed format: what a recipe may say about it."""
    return {name: backend.Options for name, backend in backends().items()}
