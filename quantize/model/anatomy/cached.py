"""What was found out of an architecture, once for each config: in this process, then in the cache on disk.

In: a config.json as a dictionary. Out: its Anatomy. Finding it out needs torch and transformers: a process that has
them loaded does it itself, any other has a process of its own do it, and stays as small as it is.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
import threading
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quantize.errors import CheckpointError, StoreError, install_line
from quantize.events import Reporter, SilentReporter
from quantize.model.anatomy.found import Anatomy
from quantize.system.cache import Cache, default_cache_root
from quantize.system.process import run_step

MOST_SECONDS = 300.0
KEPT = 64  # configs of one process
_BESIDE = frozenset({"_name_or_path", "dtype", "torch_dtype", "transformers_version", "quantization_config"})
_found: dict[str, Anatomy] = {}
_turn = threading.RLock()


def cached_anatomy(config: Mapping[str, Any]) -> Anatomy:
    """The anatomy of a config. Raises CheckpointError: of no causal language model, or what finds it out is missing."""
    key = _key(config)
    with _turn:
        if key not in _found:
            if len(_found) >= KEPT:
                _found.pop(next(iter(_found)))
            _found[key] = _remembered(key, config)
        return _found[key]


def _key(config: Mapping[str, Any]) -> str:
    known = {name: value for name, value in config.items() if name not in _BESIDE}
    text = json.dumps(known, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _code() -> str:
    """Of what finds it out: another version of it may find something else."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.py"), folder.with_name("layout.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _remembered(key: str, config: Mapping[str, Any]) -> Anatomy:
    """From the disk, or found out now; what a class that is not transformers' own is made of is not remembered."""
    try:
        tools = f"transformers {version('transformers')} torch {version('torch')}"
    except PackageNotFoundError as exc:
        raise CheckpointError(
            f"what the blocks of {_said(config)} are made of is found out with {exc.name}, which is not installed",
            hint=f"install it with: {install_line('torch')}",
        ) from exc
    disk, name = Cache(default_cache_root()), f"anatomy {_code()} {tools} {key}"
    own: list[Anatomy] = []

    def find() -> dict[str, Any]:
        found = _find(config)
        if not found.is_of_transformers:
            own.append(found)
            raise _NotKept
        return found.to_data()

    try:
        return Anatomy.from_data(disk.fact(name, find))
    except _NotKept:
        return own[0]
    except StoreError:
        return _find(config)


class _NotKept(Exception):
    """The cache keeps nothing of it."""


def _find(config: Mapping[str, Any]) -> Anatomy:
    if "torch" in sys.modules or multiprocessing.current_process().daemon:
        return find_here(SilentReporter(), dict(config))
    what = f"what {_said(config)} is made of"
    return run_step(f"finding out {what}", SilentReporter(), find_here, dict(config), most_seconds=MOST_SECONDS)


def find_here(_reporter: Reporter, config: dict[str, Any]) -> Anatomy:
    """In this process. Raises CheckpointError."""
    from quantize.model.anatomy.find import find

    return find(config)


def _said(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "the model"
