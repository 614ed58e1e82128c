"""Golden prompt files: questions with a grader each, in YAML.

In: paths of files. Out: GoldenSet, with a hash; or RecipeError that says file:line:column. Grading answers is left to
graders.py, turning prompts into token ids to prompts.py.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from quantize.errors import MissingExtraError, RecipeError
from quantize.recipe.yaml import STRICT, in_time, read_document, validate
from quantize.system.untrusted import check_pattern

Text = Annotated[str, Field(min_length=1)]
Kind = Literal["exact", "contains", "regex", "json", "refusal", "same"]
PLACE = "{haystack}"

# What each grader reads; anything else beside it would be passed over silently.
_FIELDS: dict[str, frozenset[str]] = {
    "exact": frozenset({"answers"}),
    "contains": frozenset({"all", "any", "none"}),
    "regex": frozenset({"pattern"}),
    "json": frozenset({"schema_", "strict"}),
    "refusal": frozenset({"none"}),
    "same": frozenset({"similarity"}),
}


class Grade(BaseModel):
    """How an answer is judged. Letters are compared without case, in Unicode's composed form."""

    model_config = STRICT
    kind: Kind
    answers: list[Text] | None = Field(None, description="exact: the whole answer is one of these")
    all: list[Text] | None = Field(None, description="contains: every one of these occurs")
    any: list[Text] | None = Field(None, description="contains: at least one of these occurs")
    none: list[Text] | None = Field(None, description="contains, refusal: not one of these occurs")
    pattern: Text | None = Field(None, description="regex: occurs somewhere (Python's syntax)")
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema", description="json: a JSON Schema (2020-12)")
    strict: bool | None = Field(None, description="json: nothing but JSON; else the first JSON value counts")
    similarity: Annotated[float, Field(gt=0, le=1, strict=False)] | None = Field(
        None, description="same: least share of words in common with the source's answer, in order (default 0.8)"
    )

    @model_validator(mode="after")
    def _fields_belong(self) -> Grade:
        given = {name for name in type(self).model_fields if name != "kind" and getattr(self, name) is not None}
        for name in sorted(given - _FIELDS[self.kind]):
            shown = name.rstrip("_")
            raise ValueError(f"`{shown}` does not go with kind `{self.kind}` || remove it, or choose another kind")
        needed = {"exact": ("answers",), "contains": ("all", "any", "none"), "regex": ("pattern",)}.get(self.kind)
        if needed and not given & set(needed):
            raise ValueError(f"kind `{self.kind}` needs `{'`, `'.join(needed)}` || say what the answer must hold")
        return self

    @model_validator(mode="after")
    def _pattern_and_schema_are_valid(self) -> Grade:
        if self.pattern is not None:
            try:
                check_pattern(self.pattern)
            except ValueError as exc:
                raise ValueError(f"`pattern` is no regular expression: {exc} || escape it, or use `contains`") from exc
        if self.schema_ is not None:
            check_schema(self.schema_)
        return self


class Haystack(BaseModel):
    """Filler with one fact in it, as long as the context allows. It takes the place of {haystack} in the prompt."""

    model_config = STRICT
    needle: Text
    filler: Annotated[list[Text], Field(min_length=1)]
    share: Annotated[float, Field(gt=0, le=0.95, strict=False)] = Field(0.75, description="of the context")
    depth: Annotated[float, Field(ge=0, le=1, strict=False)] = Field(0.5, description="0 begins with the needle")


class Prompt(BaseModel):
    """One question."""

    model_config = STRICT
    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    category: Text = "short"
    system: Text | None = None
    prompt: Text
    haystack: Haystack | None = None
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    grade: Grade

    @model_validator(mode="after")
    def _haystack_has_a_place(self) -> Prompt:
        if (self.haystack is not None) != (PLACE in self.prompt):
            raise ValueError("`haystack`, and its name in braces in `prompt`, go together || give both or none")
        return self


class _GoldenFile(BaseModel):
    model_config = STRICT
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    language: Text = "en"
    prompts: Annotated[list[Prompt], Field(min_length=1)]


@dataclass(frozen=True)
class GoldenPrompt:
    """A prompt with the set and language that it comes from; `key` is unique among all that are asked."""

    key: str
    language: str
    prompt: Prompt


@dataclass(frozen=True)
class GoldenSet:
    """All prompts of one or more files, in order."""

    prompts: tuple[GoldenPrompt, ...]

    @property
    def hash(self) -> str:
        """Hex sha256 over everything that the prompts say; comments and layout of the files do not count."""
        data = [[item.key, item.language, item.prompt.model_dump(mode="json")] for item in self.prompts]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def load_golden(paths: Sequence[Path]) -> GoldenSet:
    """Read golden files, in the order given; a folder stands for its *.yaml files by name.

    Raises RecipeError: a file is missing or wrong (file:line:column), a name or id is there twice, there are none.
    """
    files = [file for path in paths for file in (sorted(path.glob("*.yaml")) if path.is_dir() else [path])]
    if not files:
        where = ", ".join(map(str, paths)) or "no path"
        raise RecipeError(f"{where}: no golden prompt files", hint="calibration/golden/english.yaml shows the form")
    prompts: list[GoldenPrompt] = []
    names: dict[str, Path] = {}
    for file in files:
        found, name = _load_file(file)
        if name in names:
            raise RecipeError(f"{file}:1:1: the set {name} is already in {names[name]}", hint="give it another name")
        names[name] = file
        prompts += found
    return GoldenSet(tuple(prompts))


def _load_file(path: Path) -> tuple[list[GoldenPrompt], str]:
    document = read_document(path)
    with in_time(path):
        file = validate(_GoldenFile, document)
    seen: set[str] = set()
    for index, prompt in enumerate(file.prompts):
        if prompt.id in seen:
            raise document.error(("prompts", index, "id"), f"the id {prompt.id} is there twice", hint="rename one")
        seen.add(prompt.id)
    return [GoldenPrompt(f"{file.name}/{item.id}", file.language, item) for item in file.prompts], file.name


def check_schema(schema: dict[str, Any] | bool) -> None:
    """Raise ValueError unless it is a JSON Schema of draft 2020-12 by itself; MissingExtraError without the library."""
    jsonschema = import_jsonschema()
    try:
        json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as exc:
        raise ValueError("`schema` holds what JSON has no words for || put dates between quotes") from exc
    if any(not str(target).startswith("#") for target in _references(schema)):
        raise ValueError("`schema` refers to another document || put what it refers to under `$defs`")
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as exc:
        place = "/".join(map(str, exc.absolute_path)) or "the top"
        raise ValueError(
            f"`schema` is no JSON Schema (wrong at {place}) || see json-schema.org, draft 2020-12"
        ) from exc
    except (RecursionError, OverflowError) as exc:  # of a regular expression in it
        raise ValueError(f"`schema` is no JSON Schema ({exc}) || see json-schema.org, draft 2020-12") from exc


def _references(schema: Any) -> Iterator[Any]:
    """What `$ref` and `$dynamicRef` anywhere in it name."""
    if isinstance(schema, dict):
        yield from (schema[key] for key in ("$ref", "$dynamicRef") if key in schema)
    inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    for item in inner:
        yield from _references(item)


def import_jsonschema() -> Any:
    """The jsonschema package, or MissingExtraError."""
    try:
        return importlib.import_module("jsonschema")
    except ImportError as exc:
        raise MissingExtraError("grading JSON answers", "eval") from exc
