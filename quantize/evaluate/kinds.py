"""Which held-out texts an artifact is measured on: what a recipe's `evaluation.text` names -> its parts, by kind.

In: `mixed`, the name of one of its kinds, `python-docs`, a file, or {kind: file}. Out: NamedTexts, each with the file
that holds it. `mixed` was written for this project: English prose, code in many languages, Vietnamese prose, and
questions that the source itself answers, so that artifacts are measured where the model really goes. Calibration has
none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantize.calibration.datasets import find_held_out
from quantize.errors import UsageError
from quantize.recipe.evaluation import MIXED, Questions
from quantize.system.lookup import DATA, EVALUATION, find_path

TEXTS = {"prose": "prose.txt", "code": "code.txt", "vietnamese": "vietnamese.txt", "chat": "chat.txt"}
WINDOWS = 18
"""Of each: a tokenizer that makes more tokens of one language than of others does not give it more weight."""
ASKED = "chat"
"""The kind of which the file holds questions, one a line, and the source writes the text."""
LOOKED = "paths are looked for beside the recipe, in the folder above it, and in the working folder"


@dataclass(frozen=True)
class NamedText:
    """One text. kind: its name among several, "" for one alone. address: leads to it from any folder.

    file: what holds it. is_questions: the text is what the source answers to each line. windows: that are taken where
    nothing else is said, 0 for all.
    """

    kind: str
    address: str
    file: Path
    is_questions: bool = False
    windows: int = 0


def text_parts(text: str | Mapping[str, str | Questions], base: Path, column: str = "text") -> tuple[NamedText, ...]:
    """The texts that `evaluation.text` names. base: the folder where relative paths start.

    Raises UsageError: there is no such text. RecipeError: it can't be read.
    """
    if not isinstance(text, str):
        return tuple(_part(kind, item, base, column) for kind, item in text.items())
    if text == MIXED:
        return tuple(_builtin(kind, kind) for kind in TEXTS)
    if text in TEXTS and find_path(text, base) is None:
        return (_builtin(text, ""),)
    return (_part("", text, base, column),)


def text_name(text: str | Mapping[str, str | Questions], parts: tuple[NamedText, ...]) -> str:
    """What records call it: the built-in's name, the file's, or the kinds."""
    if isinstance(text, str):
        return text if text == MIXED or text in TEXTS else parts[0].file.name
    return ", ".join(part.kind for part in parts)


def _builtin(kind: str, name: str) -> NamedText:
    path = DATA / EVALUATION / TEXTS[kind]
    return NamedText(name, str(path), path, is_questions=kind == ASKED, windows=WINDOWS)


def _part(kind: str, item: str | Questions, base: Path, column: str) -> NamedText:
    where = f"`evaluation`{f' ({kind})' if kind else ''}"
    if isinstance(item, Questions):
        path = find_path(item.questions, base)
        if path is None or not path.is_file():
            raise UsageError(f"{where}: no such file of questions: {item.questions}", hint=LOOKED)
        return NamedText(kind, str(path.absolute()), path, is_questions=True)
    if item in TEXTS and find_path(item, base) is None:
        return _builtin(item, kind)
    found = find_held_out(item, base, column)
    if found is None:
        raise UsageError(f"{where}: no such text: {item}", hint=f"{LOOKED}; by name there are: {', '.join(known())}")
    return NamedText(kind, found.address, found.file)


def known() -> list[str]:
    """The names of the texts that come along."""
    return [MIXED, *TEXTS, "python-docs"]
