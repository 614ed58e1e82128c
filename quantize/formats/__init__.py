"""The output formats: one folder each, found through the entry-point group `quantize.formats`, built-in or not.

In: the name of a format, or a path that may hold one. Out: its Format, or its parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import Distribution, EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize import DISTRIBUTION
from quantize.errors import UsageError, VerifyError
from quantize.formats.format import Format
from quantize.runtimes.devices import ON_CPU, DevicePlace

if TYPE_CHECKING:
    from quantize.formats.base import Builder
    from quantize.recipe.model import FormatOptions
    from quantize.runtimes.base import ModelRef, Runtime, RuntimeKind

GROUP = "quantize.formats"


def formats() -> dict[str, Format]:
    """All installed formats by name. Raises UsageError if a plugin can't be loaded or two share a name."""
    return {name: item for name, (item, _) in _installed().items()}


def plugin_of(name: str) -> Distribution | None:
    """The distribution that brings a format; None where it is this one, or is not installed."""
    from packaging.utils import canonicalize_name

    _, found = _installed().get(name, (None, None))
    return None if found is None or canonicalize_name(found.name) == DISTRIBUTION else found


@cache
def _installed() -> dict[str, tuple[Format, Distribution | None]]:
    found: dict[str, tuple[Format, Distribution | None]] = {}
    for point in _points():
        loaded = _load(point)
        if loaded.name in found:
            raise UsageError(f"two plugins bring the format {loaded.name!r}", hint="uninstall one of them")
        found[loaded.name] = (loaded, point.dist)
    return found


@cache
def _points() -> tuple[EntryPoint, ...]:
    # what two installations name, as after a change of the distribution's name, is one plugin
    points = {(item.name, item.value): item for item in entry_points(group=GROUP)}
    return tuple(point for _, point in sorted(points.items()))


def _load(point: EntryPoint) -> Format:
    try:
        loaded = point.load()
        if not isinstance(loaded, Format):
            raise TypeError(f"{point.value} is a {type(loaded).__name__}, not a quantize.formats.format.Format")
    except Exception as exc:
        hint = f"update or uninstall {point.dist.name if point.dist else 'the package that brings it'}"
        raise UsageError(f"the format plugin {point.name!r} can't be loaded: {exc}", hint=hint) from exc
    return loaded


@cache
def _named(name: str) -> Format | None:
    """The format of that name without loading those of others, where a plugin is named as its format, as they are."""
    points = [point for point in _points() if point.name == name]
    found = _load(points[0]) if len(points) == 1 else None
    return found if found is not None and found.name == name else formats().get(name)


def forget_formats() -> None:
    """Look for plugins again when formats are asked for next."""
    for cached in (_installed, _points, _named):
        cached.cache_clear()


def find_format(name: str) -> Format:
    """The installed format of that name. Raises UsageError: it is not installed."""
    found = _named(name)
    if found is None:
        hint = f"install the plugin that brings it; installed are: {', '.join(formats())}"
        raise UsageError(f"the format {name!r} is not installed here", hint=hint)
    return found


def known_format(name: str) -> Format:
    """The format of that name; one that is not installed here has no facets, and stands for a plain folder."""
    from quantize.formats.folder import FolderLayout

    return _named(name) or Format(name, extra="", layout=FolderLayout(None, library=None))


def builders() -> dict[str, Builder[Any]]:
    """Formats that can be built: name -> builder."""
    return {name: item.builder for name, item in formats().items() if item.builder is not None}


def find_builder(name: str) -> Builder[Any]:
    """What builds and checks a format's artifacts. Raises UsageError: it is not installed, or not built here."""
    found = find_format(name)
    if found.builder is None:
        raise UsageError(f"the format {name} is not built here", hint=f"those that are: {', '.join(builders())}")
    return found.builder


def recorded_options(name: str, options: Mapping[str, Any]) -> FormatOptions:
    """The options of an artifact, as its manifest has them. Raises VerifyError: one is not known here. UsageError."""
    from pydantic import ValidationError

    try:
        found: FormatOptions = find_builder(name).Options.model_validate(options)
        return found
    except ValidationError as exc:
        where = ".".join(map(str, exc.errors()[0]["loc"]))
        raise VerifyError(f"the manifest's option `{where}` is not one that {name} has here") from exc


def option_models() -> dict[str, type[FormatOptions]]:
    """The options model of every format that can be built: what a recipe may say about it."""
    return {name: builder.Options for name, builder in builders().items()}


def format_of(path: Path) -> Format | None:
    """The format of a file or folder that no manifest describes; None where none is recognized."""
    return next((item for item in formats().values() if item.layout.recognizes(path)), None)


def runtime_kind(name: str) -> RuntimeKind:
    """What a format's models run in. Raises UsageError: the format is not installed, or nothing here runs it."""
    found = find_format(name)
    if found.runtime is None:
        raise UsageError(f"no runtime is known for models in the format {name}")
    return found.runtime


def open_runtime(model: ModelRef, *, context: int, threads: int = 0, place: DevicePlace = ON_CPU) -> Runtime:
    """Load a model. context: the longest window or prompt and answer, in tokens. threads: 0 leaves it to the runtime.

    Raises VerifyError: it does not load. MissingExtraError: its runtime is not installed. UsageError: no such file, or
    no runtime for its format.
    """
    if not model.path.exists():
        raise UsageError(f"{model.path}: no such {'file' if model.main_file else 'folder'}")
    return runtime_kind(model.format).open(model, context=context, threads=threads, place=place)
