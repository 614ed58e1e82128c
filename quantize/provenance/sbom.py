"""Manifest -> sbom.cdx.json: a machine-learning bill of materials in CycloneDX 1.6.

In: an artifact. Out: plain JSON data, the same for the same artifact and figures. Written as data, since
cyclonedx-python-lib does not write the data sets of a model card; it validates the result in the tests.
https://cyclonedx.org/docs/1.6/json/
"""

from __future__ import annotations

import uuid
from typing import Any

from quantize.evaluate.metric import Reading, Value
from quantize.evaluate.metrics import Summary, readings
from quantize.provenance.licence import Licence, artifact_licence
from quantize.provenance.statement import pypi_url
from quantize.store.artifact import Artifact
from quantize.store.manifest import CalibrationEntry, FileEntry, Manifest, SourceEntry
from quantize.system.digest import canonical_hash

SPEC_VERSION = "1.6"
BASE_REF, CALIBRATION_REF = "base-model", "calibration"


def bill_of_materials(artifact: Artifact) -> dict[str, Any]:
    """The BOM of an artifact: the model, its files, base model, calibration data and the tools that made it."""
    manifest = artifact.manifest
    licence = artifact_licence(artifact)
    components = [_base_model(manifest.source, licence)]
    if manifest.calibration is not None:
        components.append(_calibration(manifest.calibration))
    made_from = [BASE_REF] + ([CALIBRATION_REF] if manifest.calibration is not None else [])
    data = {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC_VERSION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "version": 1,
        "metadata": {"tools": {"components": _tools(manifest)}, "component": _model(artifact, licence)},
        "components": components,
        "dependencies": [
            {"ref": manifest.digest, "dependsOn": made_from},
            *({"ref": ref} for ref in made_from),
        ],
    }
    return {**data, "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, canonical_hash(data))}"}


def _model(artifact: Artifact, licence: Licence | None) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "type": "machine-learning-model",
        "bom-ref": manifest.digest,
        "name": f"{manifest.name}/{manifest.variant}",
        "version": manifest.short_digest,
        "description": f"{manifest.source.name}, quantized to {manifest.variant} ({manifest.format}, "
        f"{manifest.bits_per_weight:.2f} bits per weight)",
        **_licences(licence),
        "pedigree": {"ancestors": [_ancestor(manifest.source, licence)], "notes": _notes(manifest)},
        "modelCard": _model_card(artifact),
        "components": [_file(entry) for entry in manifest.files],
        "properties": [
            {"name": "quantize:digest", "value": manifest.digest},
            {"name": "quantize:build_key", "value": manifest.build_key},
            {"name": "quantize:format", "value": manifest.format},
            {"name": "quantize:bits_per_weight", "value": f"{manifest.bits_per_weight:.4f}"},
            {"name": "quantize:size_bytes", "value": str(manifest.size_bytes)},
            *([{"name": "quantize:device", "value": manifest.device}] if manifest.device else []),
        ],
    }


def _model_card(artifact: Artifact) -> dict[str, Any]:
    manifest, summary = artifact.manifest, Summary.of(artifact.measurements())
    parameters: dict[str, Any] = {
        "task": "text-generation",
        "modelArchitecture": manifest.source.architecture,
        "inputs": [{"format": "text"}],
        "outputs": [{"format": "text"}],
    }
    if manifest.calibration is not None:
        parameters["datasets"] = [{"ref": CALIBRATION_REF}]
    found = readings(summary.record) if summary.record is not None else []
    metrics = [entry for item in found for entry in _metric(item)]
    limits = [f"gates: {summary.verdict}"]
    if manifest.accepted_risk is not None:
        limits = [f"refused by its gates ({', '.join(manifest.accepted_risk.gates)}); {manifest.accepted_risk.reason}"]
    if manifest.source.quantized_before:
        limits.append(f"the base model's weights come from a {manifest.source.quantized_before} file")
    card: dict[str, Any] = {"modelParameters": parameters, "considerations": {"technicalLimitations": limits}}
    return {**card, "quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else card


def _metric(found: Reading) -> list[dict[str, str]]:
    """A metric of the model; and of the base model, where it has one of its own to compare with."""
    about = ", ".join(filter(None, (found.metric.unit, found.remark)))
    name = f"{found.metric.title} ({about})" if about else found.metric.title
    if found.source is None:
        return [{"type": f"{name}, against the base model", "value": _value(found.value)}]
    of_base = {"type": f"{name}, by the base model", "value": _value(found.source)}
    return [{"type": name, "value": _value(found.value)}, of_base]


def _value(value: Value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _notes(manifest: Manifest) -> str:
    return f"quantized by quantize {manifest.tools.get('quantize', '')} as {manifest.options.get('format')}"


def _base_model(source: SourceEntry, licence: Licence | None) -> dict[str, Any]:
    hashes = [{"alg": "SHA-256", "content": entry.sha256} for entry in source.files if len(source.files) == 1]
    return {
        **_ancestor(source, licence),
        "bom-ref": BASE_REF,
        **({"hashes": hashes} if hashes else {}),
        "components": [
            {
                "type": "file",
                "bom-ref": f"{BASE_REF}:{entry.path}",
                "name": entry.path,
                "hashes": [{"alg": "SHA-256", "content": entry.sha256}],
            }
            for entry in source.files
        ],
        "properties": [
            {"name": "quantize:source", "value": source.uri},
            {"name": "quantize:parameters", "value": str(source.parameters)},
        ],
    }


def _ancestor(source: SourceEntry, licence: Licence | None) -> dict[str, Any]:
    component: dict[str, Any] = {"type": "machine-learning-model", "name": source.base_model or source.name}
    if source.revision:
        component["version"] = source.revision
    if source.uri.startswith("hub:"):
        component["purl"] = f"pkg:huggingface/{source.uri.removeprefix('hub:')}"
    return {**component, **_licences(licence)}


def _licences(licence: Licence | None) -> dict[str, Any]:
    if licence is None:
        return {}
    return {"licenses": [{"license": {"id": licence.spdx} if licence.spdx else {"name": licence.name}}]}


def _file(entry: FileEntry) -> dict[str, Any]:
    return {
        "type": "file",
        "bom-ref": f"file:{entry.path}",
        "name": entry.path,
        "hashes": [{"alg": "SHA-256", "content": entry.sha256}],
        "properties": [{"name": "quantize:size_bytes", "value": str(entry.size_bytes)}],
    }


def _calibration(entry: CalibrationEntry) -> dict[str, Any]:
    shown = [part for part in entry.parts or () if part.left_out is None]
    sizes = [(part.dataset, part.sequences, part.tokens) for part in shown]
    return {
        "type": "data",
        "bom-ref": CALIBRATION_REF,
        "name": ", ".join(entry.names),
        "hashes": [{"alg": "SHA-256", "content": entry.hash}],
        "data": [
            {
                "type": "dataset",
                "name": name,
                "description": f"{sequences} sequences, {tokens} tokens, shown once to choose scales and rounding; the "
                "hash is over the token ids",
            }
            for name, sequences, tokens in sizes or [(entry.names[0], entry.sequences, entry.tokens)]
        ],
    }


def _tools(manifest: Manifest) -> list[dict[str, Any]]:
    return [
        {
            "type": "application" if name == "quantize" else "library",
            "name": name,
            "version": version,
            "purl": pypi_url(name, version),
        }
        for name, version in manifest.tools.items()
    ]
