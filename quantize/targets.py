"""What a TARGET on the command line means: a recipe, an artifact, a model's file or folder, an address, a spec.

In: a word as people write it, a store, the kinds that a command takes. Out: one of them, found, or an error that says
what the word is and what the command takes. What is done with it is left to the command.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar, overload

from quantize.errors import RecipeError, UsageError
from quantize.recipe.yaml import read_document
from quantize.store.artifact import Artifact, open_artifact
from quantize.store.manifest import FILE_NAME
from quantize.store.store import Store
from quantize.system.digest import is_start
from quantize.system.lookup import CALIBRATION, find_data, find_recipe, is_yaml, similar_recipe

if TYPE_CHECKING:
    from quantize.formats.format import Format

CONFIG_NAME = "config.json"
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")


class TargetKind:
    """What every kind has. noun: what it is called. given: how people write it."""

    noun: ClassVar[str]
    given: ClassVar[str]


@dataclass(frozen=True)
class RecipeTarget(TargetKind):
    """A recipe. note: which was taken, where the name could have meant two."""

    noun: ClassVar[str] = "recipe"
    given: ClassVar[str] = "a recipe's file or name"
    path: Path
    note: str | None = None


@dataclass(frozen=True)
class ArtifactTarget(TargetKind):
    """An artifact of the store, or a folder with a manifest anywhere."""

    noun: ClassVar[str] = "artifact"
    given: ClassVar[str] = "an artifact's name/variant[@digest], the start of its digest, or its folder"
    artifact: Artifact


@dataclass(frozen=True)
class FileTarget(TargetKind):
    """A file that is a whole model, of a format that is one file."""

    noun: ClassVar[str] = "model's file"
    given: ClassVar[str] = "a model's file"
    path: Path
    format: Format


@dataclass(frozen=True)
class FolderTarget(TargetKind):
    """A folder in the Hugging Face layout that no manifest describes."""

    noun: ClassVar[str] = "model's folder"
    given: ClassVar[str] = f"a model's folder, with its {CONFIG_NAME}"
    path: Path


@dataclass(frozen=True)
class AddressTarget(TargetKind):
    """A server's address."""

    noun: ClassVar[str] = "address"
    given: ClassVar[str] = "an address, such as http://127.0.0.1:8000"
    address: str


@dataclass(frozen=True)
class SpecTarget(TargetKind):
    """A file that says which text to calibrate on. note: as a recipe's."""

    noun: ClassVar[str] = "calibration spec"
    given: ClassVar[str] = "a calibration spec's file or name"
    path: Path
    note: str | None = None


Target = RecipeTarget | ArtifactTarget | FileTarget | FolderTarget | AddressTarget | SpecTarget
A = TypeVar("A", bound=TargetKind)
B = TypeVar("B", bound=TargetKind)
C = TypeVar("C", bound=TargetKind)
D = TypeVar("D", bound=TargetKind)


@overload
def find_target(text: str, store: Store, kinds: tuple[type[A]]) -> A: ...
@overload
def find_target(text: str, store: Store, kinds: tuple[type[A], type[B]]) -> A | B: ...
@overload
def find_target(text: str, store: Store, kinds: tuple[type[A], type[B], type[C], type[D]]) -> A | B | C | D: ...


def find_target(text: str, store: Store, kinds: Sequence[type[TargetKind]]) -> TargetKind:
    """The one of `kinds` that a word means.

    What has the form of an address, a file or a folder is one; a name is a recipe's before it is an artifact's, but
    what could be the start of a digest is no recipe's name. Raises UsageError: it is nothing of these kinds, and what
    it is instead; several artifacts. VerifyError: a folder's manifest is bad. NewerSchemaError: this program can't
    read it.
    """
    other = next((found for look in _looks(kinds) if (found := look(text)) is not None), None)
    if other is not None and type(other) in kinds:
        return other
    artifacts = [ArtifactTarget(item) for item in store.matches(text)]
    if len(artifacts) == 1 and ArtifactTarget in kinds:
        return artifacts[0]
    other = other or (artifacts[0] if len(artifacts) == 1 else None)
    if other is None and RecipeTarget in kinds and ArtifactTarget not in kinds:
        named = find_recipe(text)
        return RecipeTarget(named.path, named.note)
    raise _refusal(text, store, kinds, other)


def find_artifact(text: str, store: Store) -> Artifact:
    """The artifact that a word means. Raises as find_target does."""
    return find_target(text, store, (ArtifactTarget,)).artifact


def _looks(kinds: Sequence[type[TargetKind]]) -> list[Callable[[str], Target | None]]:
    """What a word may be, likeliest first; where no artifact is taken, a recipe's name wins over a folder's."""
    specs = [_spec] if SpecTarget in kinds else []
    named = [_folder, _named_recipe] if ArtifactTarget in kinds else [_any_recipe, _folder]
    return [_address, *specs, _recipe_file, _file, *named]


def _address(text: str) -> AddressTarget | None:
    return AddressTarget(text) if ADDRESS.match(text) else None


def _spec(text: str) -> SpecTarget | None:
    found = find_data(text, Path(), CALIBRATION)
    if found is None or not os.path.isfile(found.path):
        return None
    try:
        data = read_document(found.path).data
    except RecipeError:
        return None  # its reader will say what is wrong with it
    is_spec = isinstance(data, dict) and "dataset" in data and "variants" not in data
    return SpecTarget(found.path, found.note) if is_spec else None


def _recipe_file(text: str) -> RecipeTarget | None:
    return RecipeTarget(Path(text)) if is_yaml(text) else None


def _file(text: str) -> FileTarget | None:
    if not os.path.isfile(text):
        return None
    from quantize.formats import format_of  # takes a third of the time in which `show` is done

    kind = format_of(Path(text))
    return FileTarget(Path(text), kind) if kind is not None else None


def _folder(text: str) -> ArtifactTarget | FolderTarget | None:
    path = Path(text)
    if os.path.isfile(path / FILE_NAME):
        return ArtifactTarget(open_artifact(path))
    return FolderTarget(path) if os.path.isfile(path / CONFIG_NAME) else None


def _named_recipe(text: str) -> RecipeTarget | None:
    return _any_recipe(text) if not is_start(text) and not os.path.lexists(text) else None


def _any_recipe(text: str) -> RecipeTarget | None:
    try:
        named = find_recipe(text)
    except UsageError:
        return None
    return RecipeTarget(named.path, named.note) if os.path.isfile(named.path) else None


def _refusal(text: str, store: Store, kinds: Sequence[type[TargetKind]], other: Target | None) -> UsageError:
    """What the word is, and what would do."""
    takes = _either(kind.given for kind in kinds)
    if other is not None:
        return UsageError(f"{text!r} is {'an' if other.noun[0] in 'ae' else 'a'} {other.noun}", hint=f"give {takes}")
    if ArtifactTarget in kinds and (several := len(store.matches(text))) > 1:
        return UsageError(f"{text!r} means {several} artifacts", hint="give more of the digest")
    if ArtifactTarget in kinds:
        store.refuse_newer(text)
    if FileTarget in kinds and os.path.isfile(text):
        return UsageError(f"{text}: not a file of any installed format", hint=f"give {takes}")
    if FolderTarget in kinds and os.path.isdir(text):
        return UsageError(f"{text}: a folder with neither {FILE_NAME} nor {CONFIG_NAME}", hint=f"give {takes}")
    near = similar_recipe(text) if RecipeTarget in kinds else None
    hints = [f"did you mean `{near}`?"] if near is not None else []
    hints += [store.contents()] if ArtifactTarget in kinds else []
    hints += [f"this takes {takes}"] if len(kinds) > 1 else []
    return UsageError(f"no {_either(kind.noun for kind in kinds)} {text!r}", hint="; ".join(hints))


def _either(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last
