"""The documents: the same bytes from the same artifact, valid for others, and harmless whoever wrote them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from quantize.errors import UsageError, VerifyError
from quantize.formats import find_format
from quantize.publish.pack import (
    CONFIG_NAME,
    check_config,
    check_contents,
    make_pack,
    media_type,
    model_config,
    parameter_text,
    publishable_files,
    read_pack,
)
from quantize.store.artifact import Artifact


def test_the_same_artifact_gives_the_same_bytes(artifact: Artifact) -> None:
    first, second = make_pack(artifact), make_pack(artifact)
    assert first == second
    assert read_pack(first[0].document) == first[0]
    check_contents(first[0], artifact.manifest)
    check_config(*first)
    assert "built_at" not in first[0].document.decode() + first[1].decode()


def test_every_file_is_a_layer_with_its_type(artifact: Artifact) -> None:
    (artifact.folder / "evaluation.md").write_text("figures\n")
    pack, _ = make_pack(artifact)
    types = {blob.path: blob.media_type.removeprefix("application/vnd.cncf.model.") for blob in pack.files}
    assert types == {
        "LICENSE": "doc.v1.raw",
        "README.md": "doc.v1.raw",
        "evaluation.md": "doc.v1.raw",
        "manifest.json": "doc.v1.raw",
        "measurements.json": "doc.v1.raw",
        "recipe.yaml": "doc.v1.raw",
        artifact.manifest.files[-1].path: "weight.v1.raw",
    }
    assert set(types) == set(publishable_files(artifact))
    assert media_type("tokenizer.json", ()) == "application/vnd.cncf.model.weight.config.v1.raw"


def test_an_importance_matrix_is_no_weights() -> None:
    names = ("model.gguf", "model.imatrix.gguf", "config.json")
    assert find_format("gguf").layout.weight_names(names) == ("model.gguf",)
    assert find_format("awq").layout.weight_names((*names, "model.safetensors")) == ("model.safetensors",)


@pytest.mark.parametrize(
    ("count", "text"),
    [(900, "0.9K"), (134_515_008, "134.5M"), (999_960_000, "1B"), (7_000_000_000, "7B"), (1_000_000_000_000, "1T")],
)
def test_parameters_as_the_specification_has_them(count: int, text: str) -> None:
    assert parameter_text(count) == text


def altered(artifact: Artifact, change: Callable[[dict[str, Any]], None]) -> bytes:
    data = json.loads(make_pack(artifact)[0].document)
    change(data)
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    "path",
    [
        "../escape",
        "/etc/passwd",
        "a/../../b",
        "a//b",
        ".hidden",
        "a/.b",
        "c:\\x",
        "x\ny",
        "",
        "modelpack.json",
        CONFIG_NAME,
    ],
)
def test_a_path_that_leaves_the_folder(path: str, artifact: Artifact) -> None:
    document = altered(
        artifact, lambda data: data["layers"][0]["annotations"].update({"org.cncf.model.filepath": path})
    )
    with pytest.raises(VerifyError, match="would leave the artifact's folder or hide in it"):
        read_pack(document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(artifactType="application/vnd.example"), "not a model"),
        (lambda data: data.pop("layers"), "not the manifest of a ModelPack model"),
        (lambda data: data["layers"][0].pop("annotations"), "not the manifest of a ModelPack model"),
        (lambda data: data["layers"][0].update(digest="md5:abc"), "no sha256 digest"),
        (lambda data: data["layers"][0].update(size=-1), "states no size"),
        (lambda data: data["layers"][0].update(size=True), "states no size"),
        (lambda data: data["layers"].append(data["layers"][0]), "the same path"),
    ],
)
def test_what_is_no_manifest(change: Callable[[dict[str, Any]], None], message: str, artifact: Artifact) -> None:
    with pytest.raises(VerifyError, match=message):
        read_pack(altered(artifact, change))


@pytest.mark.parametrize("document", [b"", b"[]", b"\xff", b"[" * 100_000])
def test_what_is_not_even_json_of_one(document: bytes) -> None:
    with pytest.raises(VerifyError, match="not the manifest of"):
        read_pack(document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layers: layers.pop(), "was not published"),
        (lambda layers: layers[-1].update(digest=f"sha256:{'0' * 64}"), "is not the file that the artifact's manifest"),
        (
            lambda layers: layers.append(
                {**layers[0], "annotations": {"org.cncf.model.filepath": "run.py", "title": "run.py"}}
            ),
            "run.py was published, and is not in the artifact's manifest",
        ),
    ],
)
def test_other_files_than_the_artifact_has(
    change: Callable[[list[dict[str, Any]]], None], message: str, artifact: Artifact
) -> None:
    pack = read_pack(altered(artifact, lambda data: change(_weights_last(data["layers"]))))
    with pytest.raises(VerifyError, match=message):
        check_contents(pack, artifact.manifest)


def _weights_last(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    layers.sort(key=lambda layer: "weight" in layer["mediaType"])
    return layers


@pytest.mark.parametrize("name", ["..", "a/b", "", ".staging"])
def test_a_name_that_is_no_folder(name: str, artifact: Artifact) -> None:
    with pytest.raises(VerifyError, match="can't be the name of a folder"):
        check_contents(make_pack(artifact)[0], artifact.manifest.model_copy(update={"variant": name}))


def test_a_configuration_of_other_files(artifact: Artifact) -> None:
    pack, config = make_pack(artifact)
    data = json.loads(config)
    data["modelfs"]["diffIds"].reverse()
    with pytest.raises(VerifyError, match="names other files"):
        check_config(pack, json.dumps(data).encode())


def test_a_format_that_is_not_installed(artifact: Artifact) -> None:
    """Nobody here knows what its files are: the publication would be another one than where it is installed."""
    manifest = artifact.manifest.model_copy(update={"format": "x"})
    with pytest.raises(UsageError, match="the format 'x' is not installed here"):
        make_pack(replace(artifact, manifest=manifest))


@pytest.mark.parametrize(
    "changes", [{}, {"format": "awq", "bits": 4, "options": {}}, {"format": "bitsandbytes", "bits": None}]
)
def test_the_configuration_is_valid_by_the_published_schema(changes: dict[str, Any], artifact: Artifact) -> None:
    schema = pytest.importorskip("modelpack_client.schema").CONFIG_SCHEMA
    manifest = artifact.manifest.model_copy(update=changes)
    pack, _ = make_pack(artifact)
    data = model_config(manifest, list(pack.files))
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(data)
    assert data["config"]["paramSize"] == "200K"
