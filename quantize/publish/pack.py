"""An artifact as a ModelPack document: an OCI manifest that names each of its files by sha256.

In: an artifact and the files to publish, or the bytes of a manifest that came from elsewhere. Out: a Pack. The same
files give the same bytes in every target, so a publication has one digest wherever it is.
Specification: CNCF ModelPack model-spec v1, on the OCI image specification v1.1.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from quantize.errors import VerifyError
from quantize.formats import find_format
from quantize.recipe.model import SLUG
from quantize.store.artifact import Artifact
from quantize.store.manifest import FILE_NAME, PAPERS, Manifest
from quantize.system import digest
from quantize.system.cache import hash_file
from quantize.system.untrusted import parse_json

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
WEIGHT_TYPE = "application/vnd.cncf.model.weight.v1.raw"
WEIGHT_CONFIG_TYPE = "application/vnd.cncf.model.weight.config.v1.raw"
DOC_TYPE = "application/vnd.cncf.model.doc.v1.raw"
FILEPATH = "org.cncf.model.filepath"
TITLE = "org.opencontainers.image.title"  # where oras and others look for a file's name

MAX_MANIFEST_BYTES = 4 << 20  # what registries take at most
MANIFEST_NAME = "modelpack.json"  # in targets that hold plain files
CONFIG_NAME = "modelpack-config.json"
RESERVED = (MANIFEST_NAME, CONFIG_NAME)
DOCUMENTS = ("LICENSE", "NOTICE", "USE_POLICY")


@dataclass(frozen=True)
class Blob:
    """Some bytes of a publication. path: of the file, with forward slashes, inside the artifact."""

    digest: str
    size_bytes: int
    media_type: str
    path: str

    @property
    def sha256(self) -> str:
        """Hex digits of the digest."""
        return digest.digits(self.digest)


@dataclass(frozen=True)
class Pack:
    """A publication: `document` is the manifest's bytes, `config` the blob of its configuration."""

    document: bytes
    config: Blob
    files: tuple[Blob, ...]

    @property
    def digest(self) -> str:
        """Of the manifest: it pins every byte of the publication."""
        return digest.digest_of(self.document)

    @property
    def short_digest(self) -> str:
        """Its first twelve hex digits."""
        return digest.short(self.digest)

    @property
    def blobs(self) -> tuple[Blob, ...]:
        """All that a target must hold before the manifest may name it."""
        return (self.config, *self.files)

    @property
    def size_bytes(self) -> int:
        """Of all blobs together."""
        return sum(blob.size_bytes for blob in self.blobs)

    def file(self, path: str) -> Blob:
        """The blob of one file. Raises VerifyError: there is none."""
        for blob in self.files:
            if blob.path == path:
                return blob
        raise VerifyError(f"no {path} in it", hint="it was not published by quantize")


def publishable_files(artifact: Artifact) -> dict[str, Path]:
    """What is published of an artifact, by path: what its manifest names, and the papers beside it."""
    names = {entry.path for entry in artifact.manifest.files}
    names |= {name for name in PAPERS if (artifact.folder / name).is_file()}
    return {name: artifact.folder / name for name in sorted(names)}


def make_pack(artifact: Artifact) -> tuple[Pack, bytes]:
    """The publication of an artifact whose hashes were checked, and its configuration's bytes.

    Raises UsageError: its format is not installed here, so that nobody knows what its files are.
    """
    known = {entry.path: entry for entry in artifact.manifest.files}
    kind = find_format(artifact.manifest.format)
    weights = kind.layout.weight_names(known)
    files = []
    for name, path in publishable_files(artifact).items():
        _check_path(name)
        sha256 = known[name].sha256 if name in known else hash_file(path)
        files.append(Blob(digest.from_digits(sha256), path.stat().st_size, media_type(name, weights), name))
    config = digest.canonical_json(model_config(artifact.manifest, files))
    entry = Blob(digest.digest_of(config), len(config), CONFIG_TYPE, CONFIG_NAME)
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": _descriptor(entry),
        "layers": [_descriptor(blob, {FILEPATH: blob.path, TITLE: blob.path}) for blob in files],
        "annotations": _annotations(artifact.manifest),
    }
    return Pack(digest.canonical_json(document), entry, tuple(files)), config


def media_type(path: str, weights: Container[str]) -> str:
    """The ModelPack type of a file: one of those with weights, what is needed to load them, or a document on them."""
    name = PurePosixPath(path).name
    if path in weights:
        return WEIGHT_TYPE
    return DOC_TYPE if path in PAPERS or name.startswith(DOCUMENTS) else WEIGHT_CONFIG_TYPE


def model_config(manifest: Manifest, files: list[Blob]) -> dict[str, Any]:
    """The ModelPack configuration: what registries and runtimes show of a model without fetching it."""
    source = manifest.source
    descriptor = {
        "name": f"{manifest.name}/{manifest.variant}",
        "title": f"{source.name} {manifest.variant}",
        "family": source.architecture,
        "version": manifest.digest,
        "revision": source.revision,
        "sourceURL": source.uri,
        "licenses": [source.license] if source.license else None,
    }
    kind = find_format(manifest.format)
    config = {
        "architecture": "transformer",
        "format": kind.layout.container,
        "paramSize": parameter_text(source.parameters),
        "precision": f"int{manifest.bits}" if manifest.bits else None,
        "quantization": kind.quantized_as(manifest.options),
    }
    return {
        "descriptor": {key: value for key, value in descriptor.items() if value},
        "config": {key: value for key, value in config.items() if value},
        "modelfs": {"type": "layers", "diffIds": [blob.digest for blob in files]},
    }


def parameter_text(count: int) -> str:
    """A number of parameters as ModelPack has it: at most one decimal and one of K, M, B, T, Q."""
    value, scales = count / 1000, "KMBTQ"
    for scale in scales:
        if value < 999.95 or scale == scales[-1]:
            break
        value /= 1000
    return f"{value:.1f}{scale}".replace(".0", "")


def read_pack(document: bytes) -> Pack:
    """The publication that a manifest describes. Raises VerifyError: it is none, or its paths are not harmless."""
    try:
        data = parse_json(document)
        if data["artifactType"] != ARTIFACT_TYPE:
            raise VerifyError(f"not a model: its artifactType is {str(data['artifactType'])[:80]!r}")
        config = _blob(data["config"], CONFIG_NAME)
        files = tuple(_blob(item, item["annotations"][FILEPATH]) for item in data["layers"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        hint = "it is another kind of artifact, or was published by another tool"
        raise VerifyError(f"not the manifest of a ModelPack model ({type(exc).__name__}: {exc})", hint=hint) from exc
    paths = [blob.path.casefold() for blob in files]
    if len(set(paths)) < len(paths):
        raise VerifyError("two of its files have the same path")
    return Pack(document, config, files)


def check_contents(pack: Pack, manifest: Manifest) -> None:
    """A publication is exactly the artifact that its manifest.json describes. Raises VerifyError."""
    for text in (manifest.name, manifest.variant):
        if not SLUG.fullmatch(text):
            raise VerifyError(f"the artifact calls itself {text[:80]!r}, which can't be the name of a folder")
    published = {blob.path: blob for blob in pack.files}
    for entry in manifest.files:
        blob = published.pop(entry.path, None)
        if blob is None:
            raise VerifyError(f"{entry.path} is in the artifact's manifest, and was not published")
        if (blob.sha256, blob.size_bytes) != (entry.sha256, entry.size_bytes):
            raise VerifyError(f"{entry.path}: what was published is not the file that the artifact's manifest names")
    others = sorted(set(published) - set(PAPERS))
    if others:
        raise VerifyError(f"{others[0]} was published, and is not in the artifact's manifest")


def check_config(pack: Pack, config: bytes) -> None:
    """The configuration names the same files as the manifest. Raises VerifyError."""
    try:
        named = parse_json(config)["modelfs"]["diffIds"]
    except (ValueError, KeyError, TypeError) as exc:
        raise VerifyError(f"its configuration is not one of a ModelPack model ({type(exc).__name__})") from exc
    if named != [blob.digest for blob in pack.files]:
        raise VerifyError("its configuration names other files than its manifest")


def _descriptor(blob: Blob, annotations: Mapping[str, str] | None = None) -> dict[str, Any]:
    entry = {"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size_bytes}
    return {**entry, "annotations": dict(annotations)} if annotations else entry


def _annotations(manifest: Manifest) -> dict[str, str]:
    found = {
        TITLE: f"{manifest.name}/{manifest.variant}",
        "org.opencontainers.image.version": manifest.variant,
        "org.opencontainers.image.licenses": manifest.source.license,
        "quantize.artifact.digest": manifest.digest,
    }
    return {key: value for key, value in found.items() if value}


def _blob(item: Mapping[str, Any], path: str) -> Blob:
    named, size = item["digest"], item["size"]
    if not isinstance(named, str) or not digest.is_whole(named):
        raise VerifyError(f"it names something by {str(named)[:80]!r}, which is no sha256 digest")
    if type(size) is not int or size < 0:
        raise VerifyError(f"it states no size for {named}")
    _check_path(path, reserved=() if path == CONFIG_NAME and item["mediaType"] == CONFIG_TYPE else RESERVED)
    return Blob(named, size, str(item["mediaType"]), path)


def _check_path(path: str, reserved: tuple[str, ...] = RESERVED) -> None:
    parts = path.split("/")
    bad = path in reserved or any(part == "" or part.startswith(".") for part in parts)
    if bad or len(path) > 1000 or re.search(r"[\x00-\x1f\x7f\\:]", path):
        raise VerifyError(f"it names a file {path[:80]!r}, which would leave the artifact's folder or hide in it")


def manifest_blob(pack: Pack) -> Blob:
    """Where an artifact's own manifest.json is in a publication. Raises VerifyError: it has none."""
    return pack.file(FILE_NAME)
