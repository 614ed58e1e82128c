"""YAML text -> validated models, with every error at file:line:column and the offending line shown.

In: the path or text of a YAML file, a pydantic model. Out: an instance of the model, or RecipeError.
What the fields mean is left to the models.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from quantize.errors import RecipeError, first_line
from quantize.system.lookup import is_yaml
from quantize.system.untrusted import read_limited, time_limit

STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
"""Of the models that a file is validated by."""
MAX_BYTES = 1 << 20
MAX_VALUES = 50_000  # a file that grows past this through aliases is an attack or an accident
MAX_CHARACTERS = 4 << 20  # of all values, aliases expanded
MAX_DEPTH = 50
MAX_SECONDS = 10  # of processor time, to check a document
MAX_NUMBER = 100  # characters of what is no text
MAX_INTEGER = (1 << 53) - 1  # beyond this, JSON does not keep whole numbers exact (RFC 8785)
TOO_MUCH = "too many values, or nested too deeply"
LESS = "write it with fewer levels and aliases"

TEXT_TAG = "tag:yaml.org,2002:str"

COLLECTION_TAGS = {"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}
MESSAGES = {  # pydantic's error type -> our words, where its own speak of Python
    "model_type": "expected keys and values here",
    "dict_type": "expected keys and values here",
    "list_type": "expected a list",
    "string_type": "expected text",
    "bool_type": "expected true or false",
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "too_short": "must have at least {min_length} item",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
}

Location = tuple[int | str, ...]
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Document:
    """Plain data from a YAML file and where each key and value of it stands (line and column from 0)."""

    path: str
    text: str
    lines: tuple[str, ...]
    data: Any
    values: Mapping[Location, tuple[int, int]]
    keys: Mapping[Location, tuple[int, int]]

    def error(self, at: Location, message: str, *, hint: str | None = None, key: bool = False) -> RecipeError:
        """A RecipeError at the key (key=True) or value that `at` names, or at its nearest parent."""
        marks = self.keys if key else self.values
        where = (0, 0)
        for length in range(len(at), -1, -1):
            if at[:length] in marks:
                where = marks[at[:length]]
                break
        return _error(self.path, self.lines, where, message, hint)


def read_document(path: Path) -> Document:
    """Read a YAML file as UTF-8.

    Raises RecipeError: not there, not readable, too large, not UTF-8, not YAML, a key twice, alias bomb.
    """
    try:
        if path.is_dir():
            raise RecipeError(f"{path}: this is a folder, not a file", hint="name the YAML file itself")
        text = read_limited(path, MAX_BYTES).decode("utf-8")
    except FileNotFoundError as exc:
        raise RecipeError(f"{path}: no such file", hint=_similar_file(path)) from exc
    except UnicodeDecodeError as exc:
        raise RecipeError(f"{path}:1:1: not UTF-8 text (byte {exc.start})", hint="save the file as UTF-8") from exc
    except OSError as exc:
        hint = "make it smaller" if exc.errno == errno.EFBIG else "check its permissions"
        raise RecipeError(f"{path}: can't be read: {exc.strerror}", hint=hint) from exc
    return parse_document(text, str(path))


def parse_document(text: str, path: str) -> Document:
    """Parse YAML text; `path` is only used in messages. Raises RecipeError as read_document does."""
    lines = tuple(text.splitlines())
    try:
        node = yaml.compose(text, Loader=_Loader)
    except _TooMuch as exc:
        raise _error(path, lines, exc.where, TOO_MUCH, LESS) from exc
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        where = (mark.line, mark.column) if mark else (0, 0)
        raise _error(path, lines, where, f"not valid YAML: {exc.problem or exc.context}", None) from exc
    except (yaml.YAMLError, ValueError, ArithmeticError) as exc:  # "\UFFFFFFFF" is beyond what PyYAML checks
        raise RecipeError(f"{path}:1:1: not valid YAML: {first_line(exc)}") from exc
    if node is None:
        raise RecipeError(f"{path}:1:1: the file is empty", hint="start from one of the files in recipes/")
    builder = _Builder(path, lines)
    data = builder.build(node, (), 0)
    return Document(path, text, lines, data, builder.values, builder.keys)


def validate(model: type[Model], document: Document, *, at: Location = (), also: Sequence[str] = ()) -> Model:
    """Make `model` from the part of the document at `at`. Raises RecipeError for the first thing that is wrong.

    also: keys that the caller has read already, for suggestions.
    """
    part = document.data
    for step in at:
        part = part[step]
    if not isinstance(part, dict):
        kind = "list" if isinstance(part, list) else "single value"
        raise document.error(at, f"expected keys and values here, found a {kind}")
    try:
        return model.model_validate(part, context={"path": document.path})
    except ValidationError as exc:
        raise _translate(exc, document, at, model, also) from exc


@contextlib.contextmanager
def in_time(path: Path) -> Iterator[None]:
    """A limit on the processor time of checking a document, for the regular expressions in it. Raises RecipeError."""
    try:
        with time_limit(MAX_SECONDS):
            yield
    except TimeoutError as exc:
        hint = "leave out wide ranges that ignore case, such as (?i)[\\0-\\U0010ffff]"
        raise RecipeError(f"{path}:1:1: its patterns take more than {MAX_SECONDS} s to read", hint=hint) from exc


def suggest(word: str, known: list[str]) -> str | None:
    """A hint for a misspelt word: the nearest known one, else all of them."""
    near = difflib.get_close_matches(word.lower(), [name.lower() for name in known], n=1, cutoff=0.6)
    if near:
        original = next(name for name in known if name.lower() == near[0])
        return f"did you mean `{original}`?"
    return f"known: {', '.join(known)}" if known else None


class _TooMuch(Exception):
    def __init__(self, mark: Any) -> None:
        super().__init__(TOO_MUCH)
        self.where = (mark.line, mark.column)


class _Loader(yaml.SafeLoader):
    """PyYAML's own, that stops where a document has more values or levels than a recipe can have."""

    _values = _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self._values > MAX_VALUES or self._depth > MAX_DEPTH:
            raise _TooMuch(self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        self._values += 1
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Builder:
    """Walks a composed YAML tree into plain data and notes where everything stands."""

    def __init__(self, path: str, lines: tuple[str, ...]) -> None:
        self.path, self.lines = path, lines
        self.values: dict[Location, tuple[int, int]] = {}
        self.keys: dict[Location, tuple[int, int]] = {}
        self._scalars = yaml.SafeLoader("")
        self._characters = 0

    def build(self, node: yaml.Node, at: Location, depth: int) -> Any:
        where = (node.start_mark.line, node.start_mark.column)
        if len(self.values) > MAX_VALUES or depth > MAX_DEPTH or self._characters > MAX_CHARACTERS:
            raise _error(self.path, self.lines, where, TOO_MUCH, LESS)
        self.values[at] = where
        if isinstance(node, yaml.CollectionNode) and node.tag not in COLLECTION_TAGS:
            raise _error(self.path, self.lines, where, f"the tag {node.tag!r} is not allowed", "write plain YAML")
        if isinstance(node, yaml.MappingNode):
            return {key: self.build(value, (*at, key), depth + 1) for key, value in self._pairs(node, at)}
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*at, index), depth + 1) for index, item in enumerate(node.value)]
        self._characters += len(node.value)
        if node.tag != TEXT_TAG and len(node.value) > MAX_NUMBER:
            raise _error(self.path, self.lines, where, "too long for a number or date", "put text between quotes")
        try:
            value = self._scalars.construct_object(node)
        except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError) as exc:
            raise _error(self.path, self.lines, where, f"not a plain value: {first_line(exc)}", None) from exc
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise _error(self.path, self.lines, where, f"more than {MAX_INTEGER:,}", "put text between quotes")
        if isinstance(value, str) and not _is_text(value):
            raise _error(self.path, self.lines, where, "text with half of a surrogate pair", None)
        return value

    def _pairs(self, node: yaml.MappingNode, at: Location) -> Iterator[tuple[str, yaml.Node]]:
        seen: set[str] = set()
        for key_node, value_node in node.value:
            where = (key_node.start_mark.line, key_node.start_mark.column)
            if not isinstance(key_node, yaml.ScalarNode):
                raise _error(self.path, self.lines, where, "a key must be a single word", None)
            key = str(key_node.value)
            self._characters += len(key)
            if not _is_text(key):
                raise _error(self.path, self.lines, where, "a key has half of a surrogate pair", None)
            if key == "<<":
                hint = "name shared options once, under `defaults:`"
                raise _error(self.path, self.lines, where, "merge keys are not read", hint)
            if key in seen:
                raise _error(self.path, self.lines, where, f"key `{key}` is here twice", "remove one of the two")
            seen.add(key)
            self.keys[(*at, key)] = where
            yield key, value_node


def _is_text(value: str) -> bool:
    """False with half of a surrogate pair in it ("\\ud800"): no file or hash can hold that."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _translate(
    exc: ValidationError, document: Document, at: Location, model: type[BaseModel], also: Sequence[str]
) -> RecipeError:
    problems = exc.errors(include_url=False)
    apt = [item for item in problems if not _is_other_reading(item, problems, document, at)]
    problem = min(apt, key=_rank(document, at))
    location = (*at, *_known_part(problem["loc"], document, at))
    kind = problem["type"]
    if kind == "extra_forbidden":
        key = str(problem["loc"][-1])
        fields = [*_fields_at(model, problem["loc"][:-1]), *(also if len(problem["loc"]) == 1 else ())]
        fields = [item for item in fields if item not in _siblings(document, location)]
        return document.error(location, f"unknown key `{key}`", hint=suggest(key, fields), key=True)
    if kind == "missing":
        return document.error(location, f"key `{problem['loc'][-1]}` is missing", hint="add it")
    if kind in MESSAGES:
        message = MESSAGES[kind].format(**problem.get("ctx", {}))
    else:
        message = problem["msg"].removeprefix("Value error, ")  # may hold braces of the user's own
    message, _, hint = message.partition(" || ")
    found = problem.get("input")
    if isinstance(found, (str, int, float, bool)) and not message.startswith(("`", "'")):
        message = f"{message}, found {found!r}"
    name = next((str(step) for step in reversed(location) if isinstance(step, str)), "")
    return document.error(location, f"`{name}`: {message}" if name else message, hint=hint or None)


def _is_other_reading(problem: Any, problems: Sequence[Any], document: Document, at: Location) -> bool:
    """Whether a value that may be one of several things was read as one that it is not, and another went deeper."""
    loc = problem["loc"]
    if not problem["type"].endswith("_type") or (*at, *loc) in document.values:
        return False
    return any(len(item["loc"]) > len(loc) and item["loc"][: len(loc) - 1] == loc[:-1] for item in problems)


def _rank(document: Document, at: Location) -> Callable[[Any], tuple[int, int, int]]:
    """Sorts errors: unknown keys first, then in the order of the file."""

    def rank(problem: Any) -> tuple[int, int, int]:
        location = (*at, *_known_part(problem["loc"], document, at))
        marks = document.keys if problem["type"] == "extra_forbidden" else document.values
        line, column = marks.get(location, document.values.get(location, (0, 0)))
        return (0 if problem["type"] == "extra_forbidden" else 1, line, column)

    return rank


def _known_part(loc: Location, document: Document, at: Location) -> Location:
    """Drop the steps that pydantic adds for union members: they name no place in the file."""
    kept: Location = ()
    for step in loc:
        if (*at, *kept, step) in document.values:
            kept = (*kept, step)
    return kept


def _siblings(document: Document, location: Location) -> set[str]:
    parent = location[:-1]
    return {str(key[-1]) for key in document.keys if key[:-1] == parent and key != location}


def _fields_at(model: type[BaseModel], loc: Location) -> list[str]:
    """Names of the keys that may stand at `loc` inside `model`."""
    current: Any = model
    for step in loc:
        inner = _models_in(current.model_fields[step].annotation) if step in current.model_fields else []
        named = [item for item in inner if item.__name__ == step]
        if named or inner:
            current = (named or inner)[0]
    return [field.alias or name for name, field in current.model_fields.items()]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in _models_in(part)]


def _error(path: str, lines: tuple[str, ...], where: tuple[int, int], message: str, hint: str | None) -> RecipeError:
    line, column = where
    text = f"{path}:{line + 1}:{column + 1}: {message}"
    if line < len(lines) and lines[line].strip():
        shown = lines[line][:160]
        gutter = f"  {line + 1:>4} | "
        text += f"\n{gutter}{shown}\n{' ' * (len(gutter) - 2)}| {' ' * min(column, 160)}^"
    return RecipeError(text, hint=hint)


def _similar_file(path: Path) -> str | None:
    try:
        names = [item.name for item in path.parent.iterdir() if is_yaml(item)]
    except OSError:
        return f"the folder {path.parent} is not there either"
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / near[0]}?" if near else "check the path"
