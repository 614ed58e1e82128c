"""What formats need, by the metadata of the distributions that bring them, and which of it is not here.

In: a Format, or extras of this program. Out: requirements as packaging has them. Nothing is imported.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from quantize import DISTRIBUTION
from quantize.errors import UsageError
from quantize.formats import plugin_of
from quantize.formats.format import Format


def required_by(kind: Format, extras: Sequence[str] | None = None) -> list[Requirement]:
    """All that a format takes to be built, or what the given extras take; either with what its plugin requires."""
    found = plugin_of(kind.name)
    stated = [Requirement(text) for text in (found.requires if found else None) or []]
    mine = [item for item in stated if item.marker is None or item.marker.evaluate({"extra": ""})]
    return [*required([kind.extra] if extras is None else extras), *_followed(mine)]


def required(extras: Sequence[str]) -> list[Requirement]:
    """What extras of this program require, extras of our own followed to what they require. Raises UsageError."""
    stated = [Requirement(text) for text in _own().requires or []]
    chosen = [
        item for item in stated
        if item.marker is not None and any(item.marker.evaluate({"extra": extra}) for extra in extras)
    ]  # fmt: skip
    return list(_followed(chosen))


def unmet(wanted: Sequence[Requirement], only: Collection[str] | None = None) -> tuple[str, ...]:
    """Those that are not met here; only: just those of some distributions."""
    texts = (f"{item.name}{item.specifier}" for item in wanted if (only is None or item.name in only) and _lacks(item))
    return tuple(dict.fromkeys(texts))


def unknown(extras: Sequence[str]) -> tuple[str, ...]:
    """Extras that this installation does not know: its metadata is older than its code."""
    known, strange = _own().metadata.get_all("Provides-Extra") or [], "which this installation does not know"
    return tuple(f"{DISTRIBUTION}[{extra}], {strange}" for extra in extras if extra not in known)


def version_of(name: str) -> str | None:
    """Of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _followed(items: Sequence[Requirement]) -> Iterator[Requirement]:
    for item in items:
        if canonicalize_name(item.name) == DISTRIBUTION:
            yield from required(sorted(item.extras))
        else:
            yield item


def _own() -> metadata.Distribution:
    try:
        return metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError as exc:
        hint = "in a clone: pip install -e ."
        raise UsageError(f"{DISTRIBUTION} is not installed, only its code is here", hint=hint) from exc


def _lacks(item: Requirement) -> bool:
    version = version_of(item.name)
    return version is None or not item.specifier.contains(version, prereleases=True)
