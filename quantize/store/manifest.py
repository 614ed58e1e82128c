"""manifest.json: what an artifact is, from what, with what. The same inputs give the same bytes.

In: plain facts. Out: a frozen Manifest, its JSON, its digest. Nothing that differs from run to run belongs here:
times, hosts, speeds and measured memory are in measurements.json. Nor do opinions: estimates are made when asked for.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from quantize import __version__
from quantize.errors import NewerSchemaError, VerifyError, first_line
from quantize.store.schema_1 import upgrade
from quantize.system.digest import document_digest, short
from quantize.system.untrusted import parse_json, read_limited

OWN = "quantize"  # this program among the tools
SCHEMA_VERSION = 2
FILE_NAME = "manifest.json"
MEASUREMENTS_NAME = "measurements.json"
RECIPE_NAME = "recipe.yaml"
EVALUATION_NAME = "evaluation.md"
CARD_NAME = "README.md"
PROVENANCE_NAME = "provenance.json"
SBOM_NAME = "sbom.cdx.json"
NOTICE_NAME = "NOTICE"  # where the licence asks for one that the base model does not have
CHART_NAME = "quality.svg"  # beside the card, where there are figures of several variants
SIGNATURE_NAME = "model.sig"
# About the artifact, not part of what is pinned.
PAPERS = (
    FILE_NAME, MEASUREMENTS_NAME, RECIPE_NAME, EVALUATION_NAME, CARD_NAME, PROVENANCE_NAME, SBOM_NAME, NOTICE_NAME,
    CHART_NAME, SIGNATURE_NAME,
)  # fmt: skip
MAX_BYTES = 16 << 20


def _inside(value: str) -> str:
    """A relative path that stays inside, whatever the system."""
    plain = value.replace("\\", "/")
    if not value or "\0" in value or plain.startswith("/") or ".." in plain.split("/"):
        raise ValueError(f"the manifest names {value!r}, outside the artifact")
    return value


def _folder_name(value: str) -> str:
    if not value or value.startswith(".") or "\0" in value or "/" in value or "\\" in value:
        raise ValueError(f"not the name of a folder: {value!r}")
    return value


Name = Annotated[str, AfterValidator(_folder_name)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Frozen):
    """One file of the artifact: path with forward slashes, inside the artifact."""

    path: Annotated[str, AfterValidator(_inside)]
    size_bytes: int
    sha256: str


class SourceEntry(_Frozen):
    """The full-precision model that the artifact was made from. mended: what was done to its files first, in words."""

    uri: str
    revision: str | None
    name: str
    base_model: str | None
    license: str | None
    architecture: str
    parameters: int
    weights_bytes: int
    quantized_before: str | None
    files: tuple[FileEntry, ...]
    mended: tuple[str, ...] = ()

    @model_serializer(mode="wrap")
    def _only_where_mended(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `mended` where nothing was: the digests of all other manifests stay as they are."""
        data: dict[str, Any] = write(self)
        if not self.mended:
            data.pop("mended", None)
        return data


class CalibrationPart(_Frozen):
    """What one dataset of a mix gave; left_out: why it gave nothing. `hash` is over its own token ids."""

    dataset: str
    sequences: int
    tokens: int
    hash: str
    left_out: str | None


class CalibrationEntry(_Frozen):
    """The text that was shown: `hash` is the sha256 over the token ids, in order. parts: of a mix, in its order."""

    spec: dict[str, Any]
    hash: str
    sequences: int
    tokens: int
    seed: int
    parts: tuple[CalibrationPart, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The datasets that were shown."""
        if self.parts is None:
            return (str(self.spec.get("dataset", "calibration")),)
        return tuple(part.dataset for part in self.parts if part.left_out is None)

    @model_serializer(mode="wrap")
    def _only_of_a_mix(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `parts` where there are none: the digests of all other manifests stay as they are."""
        data: dict[str, Any] = write(self)
        if self.parts is None:
            data.pop("parts", None)
        return data


class KeptEntry(_Frozen):
    """A tensor stored with more bits than the variant asks for."""

    tensor: str
    type: str
    reason: str


class LeftOutEntry(_Frozen):
    """A tensor of the source that the artifact does not hold, and why."""

    tensor: str
    reason: str


class StoredEntry(_Frozen):
    """The type of what is not quantized, where it is not the one that the format stores by itself, and why."""

    type: str
    reason: str


class AcceptedRisk(_Frozen):
    """The gates that refused the artifact, and why whoever built it takes it all the same."""

    reason: str
    gates: tuple[str, ...]


class Manifest(_Frozen):
    """All that is pinned about an artifact. `digest` is the sha256 of the canonical JSON of the other fields.

    weights_bytes: of all tensors. device: the kind of processor or GPU that torch computed the numbers on, on which
    their bits may depend; None where they depend on none, or it was not recorded. schema_version: of the data that it
    was read from; one of an older schema has today's fields here, and is written as it was.
    """

    schema_version: int
    name: Name
    variant: Name
    format: str
    options: dict[str, Any]
    bits: int | None
    group_size: int | None
    bits_per_weight: float
    weights_bytes: int
    source: SourceEntry
    calibration: CalibrationEntry | None
    tools: dict[str, str]
    device: str | None
    files: tuple[FileEntry, ...]
    kept_in_high_precision: tuple[KeptEntry, ...]
    size_bytes: int
    build_key: str
    accepted_risk: AcceptedRisk | None = None
    left_out: tuple[LeftOutEntry, ...] = ()
    stored: StoredEntry | None = None
    digest: str = ""
    _stored: dict[str, Any] | None = PrivateAttr(None)  # the data of an older schema that it was read from

    @model_serializer(mode="wrap")
    def _only_what_there_is(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `left_out` and `stored` where there is none: the digests of other manifests stay as they are."""
        data: dict[str, Any] = write(self)
        for name in ("left_out", "stored"):
            if not getattr(self, name):
                data.pop(name, None)
        return data

    def sealed(self) -> Manifest:
        """The same facts as a manifest of today's schema, with its digest filled in."""
        fresh = self.model_copy(update={"schema_version": SCHEMA_VERSION})
        fresh._stored = None
        return fresh.model_copy(update={"digest": fresh.computed_digest()})

    def with_risk(self, risk: AcceptedRisk | None) -> Manifest:
        """The manifest that says so; another digest, so that whoever pulls it can't miss it."""
        return self.model_copy(update={"accepted_risk": risk}).sealed()

    def computed_digest(self) -> str:
        """sha256 of the RFC 8785 form of every field but `digest`, by the schema that it was written in."""
        return document_digest(self.to_data())

    def to_data(self) -> dict[str, Any]:
        """Plain JSON data: what manifest.json holds."""
        return copy.deepcopy(self._stored) if self._stored is not None else self.model_dump(mode="json")

    def facts(self) -> dict[str, Any]:
        """What it says, under today's names whatever its schema: to compare two of them by."""
        return self.model_dump(mode="json", exclude={"schema_version", "digest"})

    @property
    def format_options(self) -> dict[str, Any]:
        """The options without the format's name, as its own options model has them."""
        return {key: value for key, value in self.options.items() if key != "format"}

    @property
    def short_digest(self) -> str:
        """The folder's name."""
        return short(self.digest)

    def to_json(self) -> str:
        """The text of manifest.json: indented, keys sorted."""
        return json.dumps(self.to_data(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.json, of this schema or an older one.

    Raises VerifyError: not there, not ours, altered. NewerSchemaError: of a schema that this program does not know.
    """
    try:
        data = parse_json(read_limited(path, MAX_BYTES))
    except OSError as exc:
        raise VerifyError(f"{path}: {exc.strerror}", hint="is this the folder of an artifact?") from exc
    except ValueError as exc:
        raise VerifyError(f"{path}: not JSON ({first_line(exc, 80)})", hint="build the artifact again") from exc
    manifest = _parsed(data, _version(data, path), path)
    try:
        digest = manifest.computed_digest()
    except ValueError as exc:  # NaN, or a number that JSON has no exact words for
        raise VerifyError(f"{path}: altered: {first_line(exc, 80)}", hint="build the artifact again") from exc
    if manifest.digest != digest:
        raise VerifyError(f"{path}: altered: its content does not have the digest that it states")
    return manifest


def _version(data: Any, path: Path) -> int:
    """The schema of a stored manifest. Raises VerifyError: none, or NewerSchemaError."""
    version = data.get("schema_version") if isinstance(data, Mapping) else None
    if type(version) is not int or version < 1:
        raise VerifyError(f"{path}: no `schema_version`", hint="is this the manifest of an artifact?")
    if version > SCHEMA_VERSION:
        newest = f"newer than this program, which knows up to {SCHEMA_VERSION}"
        raise NewerSchemaError(f"{path}: schema version {version} is {newest}")
    return version


def _parsed(data: dict[str, Any], version: int, path: Path) -> Manifest:
    """The manifest, of whichever schema. Raises VerifyError: a field is not what it must be."""
    hint = "build the artifact again"
    try:
        manifest = Manifest.model_validate(data if version == SCHEMA_VERSION else upgrade(data))
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        raise VerifyError(f"{path}: `{where}`: {first['msg'].removeprefix('Value error, ')}", hint=hint) from exc
    except ValueError as exc:
        raise VerifyError(f"{path}: {exc}", hint=hint) from exc
    if version != SCHEMA_VERSION:
        manifest._stored = data
    return manifest


def manifest_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of manifest.json, as it is written now."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()}


def tool_versions(distributions: Iterable[str]) -> dict[str, str]:
    """Installed versions of `distributions`, and quantize's own; those that are not installed are left out."""
    versions = {OWN: __version__}
    for name in distributions:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return dict(sorted(versions.items()))
