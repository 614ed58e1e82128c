"""YAML text -> Recipe: what to build, from what, within which limits. How to run it is left to the command line.

In: a recipe file and the formats that are installed (name -> options model). Out: a frozen Recipe, or RecipeError
with file:line:column. Whether it can be built here is for plan to say.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
)

from quantize.errors import RecipeError
from quantize.recipe.calibration import Calibration, NamedOrWritten, check_mix, load_calibration
from quantize.recipe.evaluation import EvaluationSpec as EvaluationSpec
from quantize.recipe.gates import GateLimits
from quantize.recipe.serving import ServingContext
from quantize.recipe.yaml import STRICT, Document, Location, in_time, read_document, suggest, validate
from quantize.system.lookup import CALIBRATION, builtin_files, find_data, find_path, is_path_text

SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SLUG_HINT = "letters, digits, `.`, `_` and `-`, the first a letter or digit, at most 100"
MAX_VARIANTS = 500
DEFAULT_TEXT = "starter"  # of the calibration texts that come with the package


def _slug(value: str) -> str:
    if not SLUG.fullmatch(value):
        raise ValueError(f"can't be the name of a folder || {SLUG_HINT}")
    return value


SlugText = Annotated[str, AfterValidator(_slug), Field(json_schema_extra={"pattern": f"^{SLUG.pattern}$"})]


class FormatOptions(BaseModel):
    """Base of the recipe section of every format; a builder adds its own fields."""

    model_config = STRICT

    def variant_name(self) -> str:
        """The name of the variant where the recipe gives none; differs wherever the options do."""
        raise NotImplementedError


class PackageFile(BaseModel):
    """A file that an installed Python package carries."""

    model_config = STRICT
    package: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*$")] = Field(
        description="import name of the package"
    )
    file: str = Field(description="path inside the package, with forward slashes")

    @field_validator("file")
    @classmethod
    def _inside(cls, value: str) -> str:
        if value.startswith("/") or ".." in value.split("/") or "\\" in value:
            raise ValueError("must be a path inside the package || write it relative, without `..`")
        return value


class Source(BaseModel):
    """Where the full-precision checkpoint comes from."""

    model_config = STRICT
    model: str | PackageFile = Field(
        description="hub id (org/name), a local folder, a GGUF file, or {package, file} of an installed package"
    )
    revision: str | None = Field(None, description="commit, tag or branch of a hub id; recorded as a commit")
    tokenizer: str | None = Field(
        None, description="folder with the tokenizer, or org/name@revision, where it does not lie beside the weights"
    )
    adapter: str | None = Field(
        None, description="folder of a LoRA or DoRA adapter, or org/name@revision: merged before anything else"
    )
    name: SlugText | None = Field(None, description="name of the model in file names and cards")
    base_model: str | None = Field(None, description="hub id of the model that this is, for cards and provenance")
    license: str | None = Field(None, description="SPDX id or hub licence name, where the checkpoint does not say")

    @field_validator("model", "tokenizer", "adapter")
    @classmethod
    def _not_empty(cls, value: str | PackageFile | None) -> str | PackageFile | None:
        if value == "":
            raise ValueError("is empty || name a hub id, a folder or a file")
        return value

    @field_validator("revision")
    @classmethod
    def _of_a_hub_id(cls, value: str | None, info: ValidationInfo) -> str | None:
        model = info.data.get("model", "")
        if value is not None and (isinstance(model, PackageFile) or is_path_text(model)):
            raise ValueError("only goes with a hub id || remove it: files are pinned by their hash")
        return value


class PublishPolicy(BaseModel):
    """What may be published without having passed its gates, and why. Nothing here changes what is built."""

    model_config = STRICT
    unevaluated: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="publish what was never evaluated, for this reason, which its card states"
    )
    refused: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="publish what its gates refused, for this reason, which its card states"
    )


class _RecipeFile(BaseModel):
    """The shape of a recipe file, before formats look at their own sections."""

    model_config = STRICT
    name: SlugText = Field(description="names the folder under artifacts/")
    description: str | None = None
    source: Source
    calibration: NamedOrWritten | None = Field(
        None,
        description="a calibration/*.yaml file, the name of one, or its content: a dataset, or a mix of several "
        "(default: `starter`, if a variant needs it)",
    )
    defaults: dict[str, Any] = Field(default_factory=dict, description="options that all variants share")
    variants: Annotated[list[dict[str, Any]], Field(min_length=1)]
    evaluation: EvaluationSpec = EvaluationSpec()
    gates: GateLimits | None = None
    serving: ServingContext = ServingContext()
    publish: PublishPolicy = PublishPolicy()


@dataclass(frozen=True)
class Variant:
    """One artifact to build: a name that is unique in the recipe, a format, and the options of the format."""

    name: str
    format: str
    options: FormatOptions

    def normalized(self) -> dict[str, Any]:
        """All options, defaults filled in, as plain JSON data: what the build key is made of."""
        return {"format": self.format, **self.options.model_dump(mode="json")}


@dataclass(frozen=True)
class Recipe:
    """A valid recipe. `text` is the file verbatim; relative paths start at its folder.

    notes: which file was taken, where a name could have meant two. names_no_text: its calibration is the package's
    `starter`, since it says nothing of any.
    """

    name: str
    description: str | None
    source: Source
    calibration: Calibration | None
    variants: tuple[Variant, ...]
    evaluation: EvaluationSpec
    gates: GateLimits
    path: Path
    text: str
    notes: tuple[str, ...] = ()
    names_no_text: bool = False

    def find(self, relative: str) -> Path | None:
        """A path of the recipe: from its own folder, then the folder above, then the working folder."""
        return find_path(relative, self.path.parent)


def load_recipe(path: Path, formats: Mapping[str, type[FormatOptions]]) -> Recipe:
    """Read and validate a recipe file; lookup.find_recipe has the path of a name.

    Raises RecipeError: the file can't be read, or anything in it is not what a recipe may say.
    """
    document = read_document(path)
    check_mix(document, ("calibration",))
    with in_time(path):
        file = validate(_RecipeFile, document)
        variants = _variants(document, file, formats)
    calibration, notes = _calibration(document, file, path)
    return Recipe(
        file.name,
        file.description,
        file.source,
        calibration,
        variants,
        file.evaluation,
        file.gates or GateLimits(),
        path,
        document.text,
        notes,
        names_no_text=file.calibration is None,
    )


def recipe_schema(formats: Mapping[str, type[FormatOptions]]) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe file, with the options of every installed format."""
    schema = _RecipeFile.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    choices = []
    for name in sorted(formats):
        options = formats[name].model_json_schema()
        definitions.update(options.pop("$defs", {}))
        properties = {"format": {"const": name}, "name": {"type": "string"}, **options["properties"]}
        if "type" in options["properties"]:
            properties["types"] = {"type": "array", "items": options["properties"]["type"], "minItems": 1}
        definitions[f"{name}-variant"] = {
            "type": "object",
            "properties": properties,
            "required": ["format", *(key for key in options.get("required", []) if key != "type")],
            "additionalProperties": False,
        }
        choices.append({"$ref": f"#/$defs/{name}-variant"})
    loose = [{**definitions[ref["$ref"].removeprefix("#/$defs/")], "required": []} for ref in choices]
    schema["properties"]["variants"]["items"] = {"anyOf": choices or [{}]}
    schema["properties"]["defaults"] = {"type": "object", "anyOf": loose or [{}]}
    schema["title"] = "quantize recipe"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _variants(document: Document, file: _RecipeFile, formats: Mapping[str, type[FormatOptions]]) -> tuple[Variant, ...]:
    _check_defaults(document, file, formats)
    variants: list[Variant] = []
    for index, section in enumerate(file.variants):
        at: Location = ("variants", index)
        known = sorted(formats)
        if "format" not in section and "format" not in file.defaults:
            raise document.error(at, "key `format` is missing", hint=f"one of: {', '.join(known)}")
        name = section.get("format", file.defaults.get("format"))
        if not isinstance(name, str) or name not in formats:
            raise document.error((*at, "format"), f"unknown format {name!r}", hint=suggest(str(name), known))
        for merged, origins in _expand(document, at, section, file.defaults, formats[name]):
            if len(variants) == MAX_VARIANTS:
                raise document.error(at, f"more than {MAX_VARIANTS} variants", hint="write several recipes")
            variants.append(_variant(document, at, merged, origins, name, formats[name]))
        _check_unique(document, at, variants)
    return tuple(variants)


def _check_defaults(document: Document, file: _RecipeFile, formats: Mapping[str, type[FormatOptions]]) -> None:
    known = {"format", *(field for options in formats.values() for field in options.model_fields)}
    for key in file.defaults:
        if key not in known:
            at = ("defaults", key)
            raise document.error(at, f"unknown key `{key}`", hint=suggest(key, sorted(known)), key=True)


def _expand(
    document: Document, at: Location, section: dict[str, Any], defaults: dict[str, Any], options: type[FormatOptions]
) -> list[tuple[dict[str, Any], dict[str, Location]]]:
    """Put the defaults under a section, and `types: [A, B]` apart into one section each.

    With each comes where the values stand that are not in the section itself.
    """
    shared = {key: value for key, value in defaults.items() if key in options.model_fields}
    merged = {**shared, **section}
    origins: dict[str, Location] = {key: ("defaults", key) for key in shared if key not in section}
    if "types" not in section or "type" not in options.model_fields:
        return [(merged, origins)]
    types = merged.pop("types")
    if "type" in section:
        raise document.error((*at, "types"), "`type` and `types` together", hint="keep one of the two", key=True)
    if not isinstance(types, list) or not types:
        raise document.error((*at, "types"), "`types` must be a list with at least one type")
    if section.get("name") is not None and len(types) > 1:
        raise document.error((*at, "name"), "one `name` for several types", hint="leave `name` out", key=True)
    return [({**merged, "type": item}, {**origins, "type": (*at, "types", index)}) for index, item in enumerate(types)]


def _variant(
    document: Document,
    at: Location,
    merged: dict[str, Any],
    origins: dict[str, Location],
    format_name: str,
    options: type[FormatOptions],
) -> Variant:
    name = merged.get("name")
    also = ["name", "format"] + (["types"] if "type" in options.model_fields else [])
    found = _with_section(document, at, merged)
    try:
        parsed = validate(options, found, at=at, also=also)
    except RecipeError:
        parsed = validate(options, _with_marks(found, at, origins), at=at, also=also)
    if name is not None and not (isinstance(name, str) and SLUG.fullmatch(name)):
        raise document.error((*at, "name"), f"`name`: can't be the name of a folder, found {name!r}", hint=SLUG_HINT)
    return Variant(name or parsed.variant_name(), format_name, parsed)


def _with_section(document: Document, at: Location, merged: dict[str, Any]) -> Document:
    """The document with a variant's merged options in its place.

    Without `name` and `format`, which are not for the format to read.
    """
    sections = list(document.data["variants"])
    sections[int(at[1])] = {key: value for key, value in merged.items() if key not in {"name", "format"}}
    return replace(document, data={**document.data, "variants": sections})


def _with_marks(document: Document, at: Location, origins: dict[str, Location]) -> Document:
    """The same, with marks that lead from a variant's merged options to where each was written."""
    values = dict(document.values)
    for key, origin in origins.items():
        inner = {place: mark for place, mark in document.values.items() if place[: len(origin)] == origin}
        values.update({(*at, key, *place[len(origin) :]): mark for place, mark in inner.items()})
    return replace(document, values=values)


def _check_unique(document: Document, at: Location, variants: list[Variant]) -> None:
    counts = Counter(variant.name.lower() for variant in variants)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise document.error(at, f"two variants are called `{twice}`", hint="give one of them a `name` of its own")


def _calibration(document: Document, file: _RecipeFile, path: Path) -> tuple[Calibration, tuple[str, ...]]:
    """The text that is named, or the package's default, and what there is to say of where it was found."""
    if file.calibration is None:
        return load_calibration(builtin_files(CALIBRATION)[DEFAULT_TEXT]), ()
    if not isinstance(file.calibration, str):
        return file.calibration, ()
    found = find_data(file.calibration, path.parent, CALIBRATION)
    if found is None:
        hint = suggest(file.calibration, sorted(builtin_files(CALIBRATION)))
        raise document.error(("calibration",), f"no such file or name: {file.calibration}", hint=hint)
    return load_calibration(found.path), (found.note,) if found.note else ()
