"""Manifest -> provenance.json: an in-toto statement (v1) with a SLSA provenance predicate (v1).

In: an artifact, and who ran the build if that is to be said. Out: plain JSON data. Without run details the same
artifact gives the same bytes on any machine and day. Who vouches for it is the signature's matter.
https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md, https://slsa.dev/spec/v1.0/provenance
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote

from quantize import DISTRIBUTION
from quantize.errors import UsageError
from quantize.store.artifact import Artifact
from quantize.store.manifest import FILE_NAME, RECIPE_NAME, CalibrationEntry, FileEntry, Manifest, SourceEntry

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = f"pkg:pypi/{DISTRIBUTION}#docs/provenance.md"  # what the parameters mean is written there
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class RunDetails:
    """Who ran a build: a URI of what is trusted to have done it, and of the run. None: by hand, nobody vouches."""

    builder: str
    invocation: str | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> RunDetails | None:
        """From the variables that GitHub Actions and GitLab CI set; None anywhere else."""
        if environment.get("GITHUB_ACTIONS") == "true":
            server, repository = environment["GITHUB_SERVER_URL"], environment["GITHUB_REPOSITORY"]
            run = f"{environment['GITHUB_RUN_ID']}/attempts/{environment.get('GITHUB_RUN_ATTEMPT', '1')}"
            return cls(f"{server}/{environment['GITHUB_WORKFLOW_REF']}", f"{server}/{repository}/actions/runs/{run}")
        if environment.get("GITLAB_CI") == "true":
            project = environment["CI_PROJECT_URL"]
            return cls(f"{project}/-/runners/{environment['CI_RUNNER_ID']}", environment["CI_JOB_URL"])
        return None


def known_run(environment: Mapping[str, str]) -> RunDetails:
    """Who runs this, as CI says. Raises UsageError: it is no CI that is known."""
    found = RunDetails.of(environment)
    if found is None:
        raise UsageError("run details are known in GitHub Actions and GitLab CI only", hint="leave out --run-details")
    return found


def statement(artifact: Artifact, run: RunDetails | None = None) -> dict[str, Any]:
    """The statement about an artifact: its files, and what they were made from. Raises OSError."""
    manifest = artifact.manifest
    subjects = [_subject(entry.path, entry.sha256) for entry in manifest.files]
    subjects.append(_subject(FILE_NAME, hashlib.sha256(manifest.to_json().encode()).hexdigest()))
    return {
        "_type": STATEMENT_TYPE,
        "subject": sorted(subjects, key=lambda item: str(item["name"])),
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "recipe": (artifact.folder / RECIPE_NAME).read_text(encoding="utf-8"),
                    "name": manifest.name,
                    "variant": manifest.variant,
                    "options": manifest.options,
                },
                "internalParameters": {"buildKey": manifest.build_key, "digest": manifest.digest},
                "resolvedDependencies": _dependencies(manifest),
            },
            "runDetails": _run_details(artifact, run),
        },
    }


def _subject(name: str, sha256: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": sha256}}


def _dependencies(manifest: Manifest) -> list[dict[str, Any]]:
    """Source files, calibration text, tools: in-toto ResourceDescriptors."""
    found = [_source_file(manifest.source, entry) for entry in manifest.source.files]
    if manifest.calibration is not None:
        found.append(_calibration(manifest.calibration))
    return found + [{"name": name, "uri": pypi_url(name, version)} for name, version in manifest.tools.items()]


def pypi_url(name: str, version: str) -> str:
    """The package URL (purl) of a release on PyPI. name: a distribution's; manifests call this one `quantize`."""
    distribution = DISTRIBUTION if name == "quantize" else name
    return f"pkg:pypi/{distribution.lower().replace('_', '-')}@{quote(version, safe='')}"


def _source_file(source: SourceEntry, entry: FileEntry) -> dict[str, Any]:
    descriptor = {"name": entry.path, "digest": {"sha256": entry.sha256}, "annotations": {"source": source.uri}}
    if source.uri.startswith("hub:"):
        repository, _, commit = source.uri.removeprefix("hub:").partition("@")
        descriptor["uri"] = f"{HUB}/{repository}/resolve/{commit}/{quote(entry.path)}"
    return descriptor


def _calibration(entry: CalibrationEntry) -> dict[str, Any]:
    about = {"sequences": entry.sequences, "tokens": entry.tokens, "seed": entry.seed, "spec": entry.spec}
    return {"name": "calibration", "digest": {"sha256": entry.hash}, "annotations": about}


def _run_details(artifact: Artifact, run: RunDetails | None) -> dict[str, Any]:
    version = artifact.manifest.tools.get("quantize", "")
    if run is None:
        return {"builder": {"id": pypi_url("quantize", version)}}
    details = {"builder": {"id": run.builder, "version": {"quantize": version}}, "metadata": _times(artifact)}
    if run.invocation:
        details["metadata"]["invocationId"] = run.invocation
    return details


def _times(artifact: Artifact) -> dict[str, Any]:
    """When the build ended, and began, as far as its measurements know."""
    measured = artifact.measurements()
    try:
        ended = datetime.fromisoformat(str(measured["built_at"]))
        began = ended - timedelta(seconds=float(measured["build_seconds"]))
    except (KeyError, ValueError):
        return {}
    return {"startedOn": _instant(began), "finishedOn": _instant(ended)}


def _instant(moment: datetime) -> str:
    return moment.replace(microsecond=0).isoformat().replace("+00:00", "Z")
