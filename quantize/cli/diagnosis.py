"""What this machine has: versions, devices, memory, disk, and which formats can be built and served here.

In: the store's and the cache's folders. Out: a Diagnosis. Nothing heavy is imported: what is installed is read from the
packages' own metadata. Whether what is there works is tried in processes of its own (trials.py), unless it is to be
quick: then a broken package that is there looks like a good one.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantize import __version__
from quantize.build.disk import disk_free_bytes
from quantize.cli.gpu_advice import advise_on_gpus
from quantize.cli.requirements import required, required_by, unknown, unmet, version_of
from quantize.cli.trials import Trial, TrialState, try_engines
from quantize.errors import install_line
from quantize.formats import formats, plugin_of
from quantize.formats.format import Format
from quantize.system.files import existing_parent
from quantize.system.gpus import driver_version
from quantize.system.machine import Machine, detect, processor_name

ALSO_SHOWN = "hub"  # the extra whose versions are shown beside those that formats need


@dataclass(frozen=True)
class Folder:
    """A place that is written to. free_bytes: on its disk; writable: whether this user may, as permissions tell."""

    what: str
    path: Path
    free_bytes: int
    writable: bool


@dataclass(frozen=True)
class Ability:
    """One format: what is missing to build it and to serve it here, as requirements; install: the pip line, if any.

    build_broken, serve_broken: engines that are there and that it needs, but that do not work.
    """

    format: str
    build_lacks: tuple[str, ...]
    serve_lacks: tuple[str, ...]
    install: str | None
    build_broken: tuple[str, ...] = ()
    serve_broken: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """All that was found. versions: None for what is not installed. devices: what each runtime can compute on.

    trials: of each engine that is installed; None if none was started. gpu_advice: what keeps runtimes from the GPUs
    that are there. driver: NVIDIA's, by version.
    """

    versions: dict[str, str | None]
    system: str
    processor: str
    machine: Machine
    devices: dict[str, str]
    folders: tuple[Folder, ...]
    abilities: tuple[Ability, ...]
    trials: tuple[Trial, ...] | None = None
    gpu_advice: tuple[str, ...] = ()
    driver: str | None = None


def examine(store: Path, cache: Path, *, quick: bool = False) -> Diagnosis:
    """Look at this machine, and run something in each engine unless it is to be quick.

    Raises StoreError: a disk can't be asked. UsageError: not installed.
    """
    kinds = [kind for _, kind in sorted(formats().items())]
    probes = {probe.package: probe for kind in kinds for probe in kind.probes}
    trials = None if quick else try_engines([*probes.values()])
    broken = {trial.package: trial.engine for trial in trials or () if trial.state is not TrialState.WORKS}
    versions: dict[str, str | None] = {"python": platform.python_version(), "quantize": __version__}
    plugins = [found.name for kind in kinds if (found := plugin_of(kind.name)) is not None]
    needed = [item for kind in kinds for item in required_by(kind)] + required([ALSO_SHOWN])
    versions |= {name: version_of(name) for name in (*plugins, *(item.name for item in needed))}
    places = (("store", store), ("cache", cache), ("scratch", Path(tempfile.gettempdir())))
    machine = detect()
    runtimes = [kind.runtime for kind in kinds if kind.runtime is not None]
    return Diagnosis(
        versions=versions,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=processor_name(),
        machine=machine,
        devices={kind.runtime.name: kind.runtime.devices for kind in kinds if kind.runtime is not None},
        folders=tuple(
            Folder(what, path.absolute(), disk_free_bytes(path), _is_writable(path)) for what, path in places
        ),
        abilities=tuple(_ability(item, broken) for item in kinds if item.builder is not None),
        trials=trials,
        gpu_advice=advise_on_gpus(machine, runtimes, quick=quick),
        driver=driver_version() if machine.gpus else None,
    )


def _ability(kind: Format, broken: Mapping[str, str]) -> Ability:
    needed = required_by(kind)
    build, names = (*unknown([kind.extra]), *unmet(needed)), {item.name for item in needed}
    builds_with = tuple(engine for package, engine in broken.items() if package in names)
    if kind.runtime is None:
        runtime = (f"a runtime that serves {kind.name}",)
        return Ability(kind.name, build, runtime, _install(kind, [kind.extra] if build else []), builds_with)
    packages = kind.runtime.packages
    engine = unmet(required_by(kind, [kind.runtime.extra]), packages)
    server = unmet(required(["serve"]))
    extras = [*([kind.extra] if build else []), *([kind.runtime.extra] if engine else []), *(["serve"] * bool(server))]
    serves_with = tuple(name for package, name in broken.items() if package in packages)
    return Ability(kind.name, build, (*engine, *server), _install(kind, extras), builds_with, serves_with)


def _install(kind: Format, extras: Sequence[str]) -> str | None:
    """The pip line; a plugin is named beside the extras: pip looks again at what it requires."""
    plugin = plugin_of(kind.name)
    return " ".join([install_line(*dict.fromkeys(extras)), *([plugin.name] if plugin else [])]) if extras else None


def _is_writable(path: Path) -> bool:
    folder = existing_parent(path)
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
