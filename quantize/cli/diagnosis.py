"""What this machine has: versions, devices, memory, disk, and which formats can be built and served here.

In: the store's and the cache's folders. Out: a Diagnosis. Nothing heavy is imported: what is installed is read from the
packages' own metadata. Whether what is there works is tried in processes of its own (trials.py), unless it is to be
quick: then a broken package that is there looks like a good one.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from quantize import DISTRIBUTION, __version__
from quantize.build.disk import disk_free_bytes
from quantize.cli.trials import Trial, try_engines
from quantize.errors import UsageError, install_line
from quantize.formats import formats
from quantize.formats.format import Format
from quantize.system.machine import Machine, detect, processor_name

ENGINES = (
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "llama-cpp-python", "gguf", "auto-round",
    "gptqmodel", "bitsandbytes", "huggingface-hub", "datasets",
)  # fmt: skip
GPU_LIBRARIES = {"cuda": "CUDA", "hip": "ROCm", "vulkan": "Vulkan", "metal": "Metal", "sycl": "SYCL"}


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
    """All that was found. versions: None for what is not installed. torch, llama_cpp: what each can compute on.

    trials: of each engine that is installed; None if none was started.
    """

    versions: dict[str, str | None]
    system: str
    processor: str
    machine: Machine
    torch: str
    llama_cpp: str
    folders: tuple[Folder, ...]
    abilities: tuple[Ability, ...]
    trials: tuple[Trial, ...] | None = None


def examine(store: Path, cache: Path, *, quick: bool = False) -> Diagnosis:
    """Look at this machine, and run something in each engine unless it is to be quick.

    Raises StoreError: a disk can't be asked. UsageError: not installed.
    """
    trials = None if quick else try_engines()
    broken = {trial.package: trial.engine for trial in trials or () if trial.state != "works"}
    versions: dict[str, str | None] = {"python": platform.python_version(), "quantize": __version__}
    versions |= {name: _version(name) for name in ENGINES}
    places = (("store", store), ("cache", cache), ("scratch", Path(tempfile.gettempdir())))
    return Diagnosis(
        versions=versions,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=processor_name(),
        machine=detect(),
        torch=_torch_devices(versions["torch"]),
        llama_cpp=_llama_cpp_devices(),
        folders=tuple(
            Folder(what, path.absolute(), disk_free_bytes(path), _is_writable(path)) for what, path in places
        ),
        abilities=tuple(_ability(item, broken) for _, item in sorted(formats().items()) if item.builder is not None),
        trials=trials,
    )


def lacking(extras: Sequence[str], only: Sequence[str] | None = None) -> tuple[str, ...]:
    """Requirements of this program's extras that are not met here; only: just those of some distributions."""
    known = _own().metadata.get_all("Provides-Extra") or []
    strange = "which this installation does not know"
    unknown = [f"{DISTRIBUTION}[{extra}], {strange}" for extra in extras if extra not in known]
    found = [Requirement(text) for text in dict.fromkeys(_requirements(extras))]
    return (*unknown, *(str(item) for item in found if (only is None or item.name in only) and _is_lacking(item)))


def _ability(kind: Format, broken: Mapping[str, str]) -> Ability:
    build, needs = lacking([kind.extra]), _packages([kind.extra])
    builds_with = tuple(engine for package, engine in broken.items() if package in needs)
    if kind.runtime is None:
        runtime = (f"a runtime that serves {kind.name}",)
        return Ability(kind.name, build, runtime, _install([kind.extra] if build else []), builds_with)
    packages = kind.runtime.packages
    engine, server = lacking([kind.runtime.extra], packages), lacking(["serve"])
    extras = [*([kind.extra] if build else []), *([kind.runtime.extra] if engine else []), *(["serve"] * bool(server))]
    serves_with = tuple(name for package, name in broken.items() if package in packages)
    install = _install(list(dict.fromkeys(extras)))
    return Ability(kind.name, build, (*engine, *server), install, builds_with, serves_with)


def _packages(extras: Sequence[str]) -> set[str]:
    return {Requirement(text).name for text in _requirements(extras)}


def _install(extras: Sequence[str]) -> str | None:
    return install_line(*extras) if extras else None


def _requirements(extras: Sequence[str]) -> Iterator[str]:
    """What the extras require, extras of our own followed to what they require."""
    stated = [Requirement(text) for text in _own().requires or []]
    for item in stated:
        if item.marker is None or not any(item.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if canonicalize_name(item.name) == DISTRIBUTION:
            yield from _requirements(sorted(item.extras))
        else:
            yield f"{item.name}{item.specifier}"


def _own() -> metadata.Distribution:
    try:
        return metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError as exc:
        hint = "in a clone: pip install -e ."
        raise UsageError(f"{DISTRIBUTION} is not installed, only its code is here", hint=hint) from exc


def _is_lacking(item: Requirement) -> bool:
    version = _version(item.name)
    return version is None or not item.specifier.contains(version, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch_devices(version: str | None) -> str:
    if version is None:
        return "not installed"
    build = version.partition("+")[2]
    if build == "cpu":
        return "CPU only, by its build"
    return f"CPU and {build}, by its build" if build else "CPU; CUDA where a driver is (its version does not tell)"


def _llama_cpp_devices() -> str:
    """By the libraries beside it; found without importing it."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        return "not installed"
    folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
    names = {path.name for path in folder.glob("*ggml-*")}
    found = [word for key, word in GPU_LIBRARIES.items() if any(f"ggml-{key}" in name for name in names)]
    return f"CPU and {', '.join(found)}" if found else "CPU only, by its build"


def _is_writable(path: Path) -> bool:
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
