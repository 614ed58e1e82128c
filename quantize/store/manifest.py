"""manifest.json: what an artifact is, from what, with what. The same inputs give the same bytes.

In: plain facts. Out: a frozen Manifest, its JSON, its digest. Nothing that differs from run to run belongs here:
times, hosts, speeds and measured memory are in measurements.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from quantize import __version__
from quantize.errors import VerifyError, first_line
from quantize.system.digest import document_digest, short
from quantize.system.untrusted import parse_json, read_limited

OWN = "quantize"  # this program among the tools
SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"
MEASUREMENTS_NAME = "measurements.json"
RECIPE_NAME = "recipe.yaml"
EVALUATION_NAME = "evaluation.md"
CARD_NAME = "README.md"
PROVENANCE_NAME = "provenance.json"
SBOM_NAME = "sbom.cdx.json"
NOTICE_NAME = "NOTICE"  # where the licence asks for one that the base model does not have
SIGNATURE_NAME = "model.sig"
# About the artifact, not part of what is pinned.
PAPERS = (
    FILE_NAME, MEASUREMENTS_NAME, RECIPE_NAME, EVALUATION_NAME, CARD_NAME, PROVENANCE_NAME, SBOM_NAME, NOTICE_NAME,
    SIGNATURE_NAME,
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
    """The full-precision model that the artifact was made from."""

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


class CalibrationEntry(_Frozen):
    """The text that was shown: `hash` is the sha256 over the token ids, in order.

    device: the kind of processor or GPU that saw it, on which the bits depend; None in older manifests.
    """

    spec: dict[str, Any]
    hash: str
    sequences: int
    tokens: int
    seed: int
    device: str | None = None


class KeptEntry(_Frozen):
    """A tensor stored with more bits than the variant asks for."""

    tensor: str
    type: str
    reason: str


class AcceptedRisk(_Frozen):
    """The gates that refused the artifact, and why whoever built it takes it all the same."""

    reason: str
    gates: tuple[str, ...]


class Manifest(_Frozen):
    """All that is pinned about an artifact. `digest` is the sha256 of the canonical JSON of the other fields.

    `accepted_risk` is there only where a risk was accepted, and `calibration.device` only where it is known: the digest
    of every other artifact is what it would be without that field.
    """

    schema_version: int
    name: Name
    variant: Name
    format: str
    options: dict[str, Any]
    bits: int | None
    group_size: int | None
    bits_per_weight: float
    source: SourceEntry
    calibration: CalibrationEntry | None
    tools: dict[str, str]
    files: tuple[FileEntry, ...]
    kept_in_high_precision: tuple[KeptEntry, ...]
    size_bytes: int
    estimate: dict[str, Any]
    build_key: str
    accepted_risk: AcceptedRisk | None = None
    digest: str = ""

    def sealed(self) -> Manifest:
        """The same manifest with its digest filled in."""
        return self.model_copy(update={"digest": self.computed_digest()})

    def computed_digest(self) -> str:
        """sha256 of the RFC 8785 form of every field but `digest`."""
        return document_digest(self.to_data())

    def to_data(self) -> dict[str, Any]:
        """Plain JSON data: what manifest.json holds."""
        exclude: dict[str, Any] = {} if self.accepted_risk else {"accepted_risk": True}
        if self.device is None:
            exclude["calibration"] = {"device"}
        return self.model_dump(mode="json", exclude=exclude)

    @property
    def device(self) -> str | None:
        """The kind of device that its bits depend on; None where they depend on none, or it is not known."""
        return self.calibration.device if self.calibration else None

    @property
    def short_digest(self) -> str:
        """The folder's name."""
        return short(self.digest)

    def to_json(self) -> str:
        """The text of manifest.json: indented, keys sorted."""
        return json.dumps(self.to_data(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.json. Raises VerifyError: not there, not ours, newer than this program, altered."""
    try:
        data = parse_json(read_limited(path, MAX_BYTES))
    except OSError as exc:
        raise VerifyError(f"{path}: {exc.strerror}", hint="is this the folder of an artifact?") from exc
    except ValueError as exc:
        raise VerifyError(f"{path}: not JSON ({first_line(exc, 80)})", hint="build the artifact again") from exc
    data = upgrade(data, path)
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        raise VerifyError(
            f"{path}: `{where}`: {first['msg'].removeprefix('Value error, ')}", hint="build the artifact again"
        ) from exc
    try:
        digest = manifest.computed_digest()
    except ValueError as exc:  # NaN, or a number that JSON has no exact words for
        raise VerifyError(f"{path}: altered: {first_line(exc, 80)}", hint="build the artifact again") from exc
    if manifest.digest != digest:
        raise VerifyError(f"{path}: altered: its content does not have the digest that it states")
    return manifest


def upgrade(data: Any, path: Path) -> Any:
    """Bring an older schema version up to this one. Raises VerifyError if it is newer than this program."""
    version = data.get("schema_version") if isinstance(data, Mapping) else None
    if not isinstance(version, int) or version < 1:
        raise VerifyError(f"{path}: no `schema_version`", hint="is this the manifest of an artifact?")
    if version > SCHEMA_VERSION:
        raise VerifyError(f"{path}: schema version {version} is newer than this program", hint="upgrade quantize")
    return data


def manifest_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of manifest.json."""
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
