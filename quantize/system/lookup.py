"""What a user writes where a file is meant, a path or a name -> the file.

In: text from a recipe or the command line. Out: a path, with a sentence where a name could have meant two files. A name
such as `smollm2-135m` or `ultrachat` is looked for in the user's folders first, then among the recipes, calibration
specs and golden prompts that come with the package. Reading the file is left to recipe and evaluate.golden.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import quantize
from quantize.errors import UsageError

DATA = Path(quantize.__path__[0]) / "_data"
RECIPES, CALIBRATION, GOLDEN = "recipes", "calibration", "calibration/golden"  # folders, in DATA and of users
EVALUATION = "evaluation"  # in DATA: held-out text
PREFIX = "builtin:"  # before a name: what comes with the package, whatever the user's folders have
SUFFIXES = (".yaml", ".yml")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class NamedFile:
    """A file, or a folder of golden prompts. note: which of two was taken, where a name could have meant either."""

    path: Path
    note: str | None = None


def find_path(text: str, folder: Path) -> Path | None:
    """The first that exists of `text` from `folder`, the folder above it, and the working folder; else None."""
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # ~ of a user who is not there
        return None
    candidates = [path] if path.is_absolute() else [place / path for place in _places(folder)]
    return next((item for item in candidates if os.path.exists(item)), None)


def is_path_text(text: str) -> bool:
    """Whether a source or dataset string can only be meant as a path, never as a hub id."""
    return text.startswith((".", "/", "~")) or text.endswith((".gguf", ".jsonl", ".txt", ".parquet", ".json"))


def is_yaml(path: Path | str) -> bool:
    """Whether a path is written as that of a YAML file, as recipes are."""
    return Path(path).suffix in SUFFIXES


def builtin_files(kind: str) -> dict[str, Path]:
    """What comes with the package of a kind (RECIPES, CALIBRATION or GOLDEN): name -> file, by name."""
    return {path.stem: path for path in sorted((DATA / kind).glob("*.yaml"))}


def is_builtin(path: Path) -> bool:
    """Whether a path leads to what comes with the package."""
    return path.is_relative_to(DATA)


def find_recipe(text: str) -> NamedFile:
    """The recipe that a command or a caller names: a path, `recipes/NAME.yaml` here, or one of the package.

    Raises UsageError: no recipe has that name.
    """
    path = Path(text)
    if os.path.isfile(path) or is_yaml(path):
        return NamedFile(path)
    found = _named(text, RECIPES, [Path()])
    if found is not None:
        return found
    if os.path.lexists(path) or not (_NAME.fullmatch(text) or text.startswith(PREFIX)):
        return NamedFile(path)  # what is wrong with it is for its reader to say
    near = similar_recipe(text)
    hint = f"did you mean `{near}`? " if near is not None else ""
    raise UsageError(f"no recipe {text!r}", hint=f"{hint}`quantize list recipes` shows all; or give the path of a file")


def similar_recipe(text: str) -> str | None:
    """The name of a recipe that is nearly `text`."""
    known = [*builtin_files(RECIPES), *(item.stem for item in local_recipes(Path(RECIPES)))]
    near = difflib.get_close_matches(text.removeprefix(PREFIX), known, n=1)
    return near[0] if near else None


def local_recipes(folder: Path) -> list[Path]:
    """The recipe files in a folder, by name."""
    return sorted(path for suffix in SUFFIXES for path in folder.glob(f"*{suffix}"))


def find_data(text: str, folder: Path, kind: str) -> NamedFile | None:
    """A calibration spec or golden prompts, as a recipe names them: by path or by name, the user's or the package's.

    folder: where the recipe lies. kind: CALIBRATION or GOLDEN. None: there is nothing of that path or name.
    """
    path = find_path(text, folder)
    if path is None or not os.path.isfile(path):  # a folder that happens to have the name does not hide it
        found = _named(text, kind, _places(folder))
        if found is not None:
            return found
    if path is None and ".." not in Path(text).parts and os.path.exists(DATA / text):
        path = DATA / text
    return NamedFile(path) if path is not None else None


def _places(folder: Path) -> list[Path]:
    return [folder, folder.parent, Path.cwd()]


def _named(text: str, kind: str, places: Sequence[Path]) -> NamedFile | None:
    """The file of a name: the first among the users' folders, else the package's. None: neither has it."""
    name = text.removeprefix(PREFIX)
    ours = builtin_files(kind).get(name)
    if text.startswith(PREFIX) or not _NAME.fullmatch(name):
        return NamedFile(ours) if ours is not None else None
    candidates = (place / kind / f"{name}{suffix}" for place in places for suffix in SUFFIXES)
    theirs = next((path for path in candidates if os.path.isfile(path)), None)
    if theirs is None or ours is None or theirs.samefile(ours):
        path = theirs or ours
        return NamedFile(path) if path is not None else None
    note = f"`{name}` is taken to mean {theirs}; `{PREFIX}{name}` is the one that comes with quantize"
    return NamedFile(theirs, note)
