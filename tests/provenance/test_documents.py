"""An artifact's papers, judged by those who define them: in-toto's classes, CycloneDX's schema, the Hub's cards."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.model.bom import Bom
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf import json_format
from huggingface_hub import ModelCard
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from packageurl import PackageURL

from quantize.events import ListReporter
from quantize.formats.awq.format import FORMAT as AWQ
from quantize.formats.bitsandbytes.format import FORMAT as BITSANDBYTES
from quantize.formats.gguf.format import FORMAT as GGUF
from quantize.formats.gptq.format import FORMAT as GPTQ
from quantize.provenance.card import render_card
from quantize.provenance.documents import write_documents
from quantize.provenance.sbom import bill_of_materials
from quantize.provenance.statement import RunDetails, statement
from quantize.store.artifact import Artifact
from quantize.store.manifest import CARD_NAME, NOTICE_NAME, PROVENANCE_NAME, SBOM_NAME, AcceptedRisk
from quantize.store.verify import check_files
from quantize.testing import installed_formats
from tests.provenance.conftest import CALIBRATED, MEASURED, Changed

HUB = "hub:org/Base-1B@" + "1" * 40
GITHUB = {
    "GITHUB_ACTIONS": "true", "GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "org/models",
    "GITHUB_RUN_ID": "7", "GITHUB_RUN_ATTEMPT": "2", "GITHUB_WORKFLOW_REF": "org/models/.github/workflows/p.yml@refs/x",
}  # fmt: skip


def text_of(artifact: Artifact, name: str) -> str:
    return (artifact.folder / name).read_text(encoding="utf-8")


def test_all_papers_belong_to_the_artifact_and_none_to_its_digest(artifact: Artifact) -> None:
    names = write_documents(artifact)
    assert set(names) == {CARD_NAME, PROVENANCE_NAME, SBOM_NAME}
    check_files(artifact, ListReporter())


def test_the_same_artifact_gives_the_same_bytes_and_nothing_is_written_twice(
    artifact: Artifact, tmp_path: Path
) -> None:
    write_documents(artifact)
    before = {path.name: path.stat().st_ino for path in artifact.folder.iterdir()}
    names = write_documents(artifact)
    assert {path.name: path.stat().st_ino for path in artifact.folder.iterdir()} == before
    (tmp_path / "elsewhere").mkdir()
    write_documents(artifact, tmp_path / "elsewhere")
    for name in names:
        assert (tmp_path / "elsewhere" / name).read_bytes() == (artifact.folder / name).read_bytes()


def test_the_statement_parses_with_in_totos_own_classes(changed: Changed) -> None:
    artifact = changed(calibration=CALIBRATED, uri=HUB)
    data = json.loads(json.dumps(statement(artifact)))
    parsed = json_format.ParseDict(data, statement_pb2.Statement())
    Statement(parsed.subject, parsed.predicate_type, data["predicate"]).validate()
    predicate = json_format.ParseDict(data["predicate"], provenance_pb2.Provenance())  # refuses what it does not know
    assert predicate.build_definition.external_parameters["variant"] == "int8"
    assert "format: fake" in predicate.build_definition.external_parameters["recipe"]
    assert predicate.run_details.builder.id.startswith("pkg:pypi/quantize-models@")


def test_its_subjects_are_the_files_by_their_hashes(artifact: Artifact) -> None:
    subjects = {item["name"]: item["digest"]["sha256"] for item in statement(artifact)["subject"]}
    assert set(subjects) == {entry.path for entry in artifact.manifest.files} | {"manifest.json"}
    for name, digest in subjects.items():
        assert hashlib.sha256((artifact.folder / name).read_bytes()).hexdigest() == digest


def test_what_it_was_made_from(changed: Changed) -> None:
    artifact = changed(calibration=CALIBRATED, uri=HUB, tools={"quantize": "0.1.0", "torch": "2.13.0+cpu"})
    found = statement(artifact)["predicate"]["buildDefinition"]["resolvedDependencies"]
    by_name = {item["name"]: item for item in found}
    for entry in artifact.manifest.source.files:
        assert by_name[entry.path]["digest"] == {"sha256": entry.sha256}
        assert by_name[entry.path]["uri"] == f"https://huggingface.co/org/Base-1B/resolve/{'1' * 40}/{entry.path}"
    assert by_name["calibration"]["digest"] == {"sha256": CALIBRATED.hash}
    for name, version in artifact.manifest.tools.items():
        distribution = "quantize-models" if name == "quantize" else name
        assert by_name[name]["uri"] == PackageURL("pypi", None, distribution, version).to_string()


def test_nothing_of_this_run_is_said_unless_asked(changed: Changed, tmp_path: Path) -> None:
    artifact = changed(MEASURED)
    assert "2026" not in json.dumps(statement(artifact)["predicate"]["runDetails"])
    run = RunDetails.of(GITHUB)
    assert run is not None
    data = statement(artifact, run)["predicate"]
    details = json_format.ParseDict(data, provenance_pb2.Provenance()).run_details
    assert details.builder.id == "https://github.com/org/models/.github/workflows/p.yml@refs/x"
    assert details.metadata.invocation_id == "https://github.com/org/models/actions/runs/7/attempts/2"
    assert details.metadata.finished_on.seconds - details.metadata.started_on.seconds in (10, 11)
    assert RunDetails.of({}) is None
    gitlab = RunDetails.of(
        {
            "GITLAB_CI": "true",
            "CI_PROJECT_URL": "https://x/p",
            "CI_RUNNER_ID": "3",
            "CI_JOB_URL": "https://x/p/-/jobs/9",
        }
    )
    assert gitlab == RunDetails("https://x/p/-/runners/3", "https://x/p/-/jobs/9")


def test_the_bill_of_materials_validates_and_names_what_is_in_it(changed: Changed) -> None:
    artifact = changed(MEASURED, calibration=CALIBRATED, uri=HUB, revision="1" * 40, quantized_before="Q4_1")
    data = bill_of_materials(artifact)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(data)) is None
    bom = Bom.from_json(data)
    model = bom.metadata.component
    assert model is not None
    assert {item.name for item in model.components} == {entry.path for entry in artifact.manifest.files}
    base = next(item for item in bom.components if item.bom_ref.value == "base-model")
    assert str(base.purl) == "pkg:huggingface/org/Base-1B@" + "1" * 40
    assert [item.id for item in base.licenses] == ["Apache-2.0"]
    assert {item.name for item in bom.metadata.tools.components} == set(artifact.manifest.tools)
    card = data["metadata"]["component"]["modelCard"]
    assert card["modelParameters"]["datasets"] == [{"ref": "calibration"}]
    metrics = {item["type"]: item["value"] for item in card["quantitativeAnalysis"]["performanceMetrics"]}
    assert metrics["perplexity ratio, against the base model"] == "1.0396"
    assert metrics["KL divergence, mean (nats, a lower bound), against the base model"] == "0.0302"
    assert metrics["golden prompts passed"] == "13 of 23"
    assert metrics["golden prompts passed, by the base model"] == "14 of 23"


@pytest.mark.parametrize("stated", [None, "llama3.2"])
def test_it_validates_without_figures_and_without_an_spdx_id(changed: Changed, stated: str | None) -> None:
    data = bill_of_materials(changed(license=stated))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(data)) is None
    assert "quantitativeAnalysis" not in data["metadata"]["component"]["modelCard"]


def card_of(artifact: Artifact) -> ModelCard:
    write_documents(artifact)
    return ModelCard(text_of(artifact, CARD_NAME))


def test_the_cards_metadata_is_what_the_hub_reads(changed: Changed) -> None:
    data = card_of(changed(base_model="org/Base-1B")).data.to_dict()
    assert data == {
        "base_model": "org/Base-1B", "base_model_relation": "quantized", "license": "apache-2.0",
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["fake", "quantize"],
    }  # fmt: skip
    assert "base_model_relation" not in card_of(changed()).data.to_dict()  # nothing is known of the base


def test_the_card_has_the_measured_table(changed: Changed) -> None:
    text = card_of(changed(MEASURED)).text
    for row in (
        "| perplexity | 10.77 | 10.36 |",
        "| perplexity ratio | 1.0396 | 1 |",
        "| KL divergence, mean (a lower bound) | 0.0302 nats | 0 |",
        "| golden prompts passed | 13 of 23 | 14 of 23 |",
        "| golden prompts lost | 2 | 0 |",
    ):
        assert row in text
    assert "- max_gain: perplexity is 7 % better" in text
    assert "Not evaluated" not in text


def test_the_card_says_that_nothing_was_measured(changed: Changed) -> None:
    assert "**Not evaluated:**" in card_of(changed({})).text


def test_the_card_says_that_the_gates_refuse(changed: Changed) -> None:
    refused: dict[str, Any] = json.loads(json.dumps(MEASURED))
    refused["evaluation"]["verdict"] = "refused"
    refused["evaluation"]["findings"][0] |= {"outcome": "refused", "reason": "0.4 nats, at most 0.05"}
    assert "**Its gates say: refused.**\n\n- max_kl: 0.4 nats" in card_of(changed(refused)).text
    risk = AcceptedRisk(reason="for load tests only", gates=("max_kl",))
    text = card_of(changed(refused, accepted_risk=risk)).text
    assert "**Refused by its gates (max_kl) and taken all the same:** for load tests only" in text


def test_a_licences_words_and_notice_go_along(changed: Changed) -> None:
    artifact = changed(license="llama3.2", name="Llama-3.2-1B")
    assert NOTICE_NAME in write_documents(artifact)
    notice = "Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © Meta Platforms, Inc."
    assert text_of(artifact, NOTICE_NAME).startswith(notice)
    assert "quantized to int8 (fake)" in text_of(artifact, NOTICE_NAME)
    assert "**Built with Llama**" in text_of(artifact, CARD_NAME)
    check_files(artifact, ListReporter())


def test_the_base_models_own_notice_stays(changed: Changed) -> None:
    artifact = changed(license="llama3.2")
    entry = artifact.manifest.files[0].model_copy(update={"path": "NOTICE.txt"})
    carried = replace(artifact, manifest=artifact.manifest.model_copy(update={"files": (entry,)}))
    assert NOTICE_NAME not in write_documents(carried)


def test_the_card_says_how_to_run_it_in_each_runtime(artifact: Artifact) -> None:
    with installed_formats(GGUF, AWQ, GPTQ, BITSANDBYTES):
        for kind, runtimes in {
            "gguf": ("llama-server -m", "ollama create tiny-int8", "from llama_cpp import"),
            "awq": ("vllm serve .", "sglang.launch_server", "AutoModelForCausalLM"),
            "gptq": ("vllm serve .", "sglang.launch_server", "AutoModelForCausalLM"),
            "bitsandbytes": ("vLLM does not take", "AutoModelForCausalLM"),
        }.items():
            text = render_card(artifact.manifest.model_copy(update={"format": kind}))
            assert all(item in text for item in (*runtimes, "quantize serve .")), kind
        nf4 = artifact.manifest.model_copy(update={"format": "bitsandbytes", "options": {"type": "nf4"}})
        assert "vllm serve ." in render_card(nf4)
        assert "does not take" not in render_card(nf4)
