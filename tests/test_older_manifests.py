"""What was stored and published in schema 1 is read, shown, verified, pulled, served and rebuilt as it was.

tests/older/ was made by the last version that wrote schema 1 (bb20d5d), from checkpoints of quantize.testing: the
manifest of a calibrated artifact, and a whole publication but for its weights, which are made again and must be its.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rfc8785

from quantize.build.outcome import OutcomeState
from quantize.errors import NewerSchemaError, VerifyError
from quantize.estimate import vram
from quantize.events import ListReporter
from quantize.formats import option_models
from quantize.formats.diff import compare
from quantize.formats.memory import memory_of
from quantize.publish.receive import pull
from quantize.publish.transfer import Session
from quantize.recipe.model import load_recipe
from quantize.runtimes.served import Serving
from quantize.serve.engines.local import LocalEngine
from quantize.serve.preflight import engine_target, place
from quantize.serve.router import Rules
from quantize.serve.targets import LocalTarget, resolve
from quantize.store.artifact import Artifact, open_artifact, point_current, variant_folder
from quantize.store.manifest import SCHEMA_VERSION, AcceptedRisk, read_manifest
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.system.digest import short
from quantize.system.machine import Machine
from quantize.testing import FakeBuilder, TinyModel, make_checkpoint, write_recipe
from tests.conftest import Built, Run, build
from tests.publish.conftest import publish_one
from tests.serve.conftest import gateways

OLDER = Path(__file__).parent / "older"
CALIBRATED = OLDER / "gptq.json"
PUBLISHED = OLDER / "share" / "older" / "int8" / "bca2e449af26"
GIB = 2**30


def data_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def digest_by_the_book(data: dict[str, Any]) -> str:
    """As docs/artifacts.md says it, without the program."""
    rest = {key: value for key, value in data.items() if key != "digest"}
    return f"sha256:{hashlib.sha256(rfc8785.dumps(rest)).hexdigest()}"


def in_schema_1(artifact: Artifact) -> dict[str, Any]:
    """The manifest that the version before would have written of it."""
    data = artifact.manifest.to_data()
    weights, device = data.pop("weights_bytes"), data.pop("device")
    data |= {"schema_version": 1, "estimate": {"runtime": "llama.cpp", "weights_bytes": weights, "vram_bytes": []}}
    if data["accepted_risk"] is None:
        del data["accepted_risk"]
    if data["calibration"] is not None and device is not None:
        data["calibration"]["device"] = device
    return {**data, "digest": digest_by_the_book(data)}


def store_in_schema_1(store: Store, ref: str) -> Artifact:
    """Have the store hold an artifact as the version before would have left it: under its own digest, and current."""
    artifact = store.find(ref)
    data = in_schema_1(artifact)
    folder = artifact.folder.rename(artifact.folder.with_name(data["digest"][7:19]))
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    point_current(folder)
    return open_artifact(folder)


@pytest.fixture
def older(built: Built, tmp_path: Path) -> Artifact:
    """A GGUF artifact of schema 1 in a store of the test's own."""
    return store_in_schema_1(built.copy(tmp_path / "artifacts"), "tiny/q8_0")


@pytest.fixture
def share(tmp_path: Path, fake: FakeBuilder) -> Path:
    """The publication, whole again."""
    model = make_checkpoint(tmp_path / "tiny", TinyModel(blocks=1))
    recipe = load_recipe(write_recipe(tmp_path / "new.yaml", model, [{"format": "fake"}]), option_models())
    workspace = Workspace(Store(tmp_path / "new"), Cache(tmp_path / "cache"), ListReporter())
    (made,) = build(recipe, workspace, evaluate=False)
    assert made.artifact is not None
    to = Path(shutil.copytree(OLDER / "share", tmp_path / "share"))
    shutil.copyfile(made.artifact.folder / "model.safetensors", to / "older/int8/bca2e449af26/model.safetensors")
    return to


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CALIBRATED, PUBLISHED / "manifest.json"], ids=["calibrated", "plain"])
def test_a_kept_manifest_has_today_s_fields_and_its_own_digest(path: Path) -> None:
    data, manifest = data_of(path), read_manifest(path)
    assert manifest.digest == data["digest"] == digest_by_the_book(data) == manifest.computed_digest()
    assert manifest.weights_bytes == data["estimate"]["weights_bytes"]
    assert manifest.device == (data["calibration"] or {}).get("device")
    assert (manifest.schema_version, manifest.accepted_risk) == (1, None)
    assert manifest.to_json() == path.read_text(encoding="utf-8"), "it is written as it was, byte for byte"
    facts = manifest.facts()
    moved = {"weights_bytes", "device", "accepted_risk", "calibration"}
    assert {key: facts[key] for key in facts if key not in moved} == {
        key: data[key] for key in data if key not in {"estimate", "calibration", "schema_version", "digest"}
    }


def test_the_kept_manifests_are_of_both_kinds() -> None:
    assert str(read_manifest(CALIBRATED).device).startswith("cpu ")
    assert read_manifest(PUBLISHED / "manifest.json").device is None


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["estimate"].update(overhead_bytes=1), "altered: its content does not have the digest"),
        (lambda data: data["calibration"].update(device="cpu DEFAULT"), "altered: its content does not have"),
        (lambda data: data.update(bits=3), "altered: its content does not have the digest that it states"),
        (lambda data: data.update(accepted_risk=None), "altered: its content does not have the digest"),
        (lambda data: data.pop("estimate"), "`estimate.weights_bytes`: Field required"),
        (lambda data: data.update(estimate={}), "`estimate.weights_bytes`: Field required"),
        (lambda data: data["estimate"].update(weights_bytes="many"), "`weights_bytes`: Input should be a valid int"),
        (lambda data: data["estimate"].update(expected=float("nan")), "altered: "),
        (lambda data: data.update(weights_bytes=1), "`weights_bytes`: not a field of schema 1"),
        (lambda data: data.update(device=None), "`device`: not a field of schema 1"),
        (lambda data: data.update(schema_version=2), "`weights_bytes`: Field required|`estimate`: Extra inputs"),
        (lambda data: data.update(schema_version=True), "no `schema_version`"),
        (lambda data: data.update(files=[{"path": "../x", "size_bytes": 1, "sha256": ""}]), "outside the artifact"),
    ],
)
def test_a_kept_manifest_that_was_changed(change: Change, message: str, tmp_path: Path) -> None:
    data = data_of(CALIBRATED)
    change(data)
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(VerifyError, match=message):
        read_manifest(tmp_path / "manifest.json")


def test_what_is_said_anew_is_said_in_today_s_schema(tmp_path: Path) -> None:
    """Only a person's accepted risk changes a stored manifest; the digest changes with it whatever the schema."""
    manifest = read_manifest(CALIBRATED)
    risk = AcceptedRisk(reason="for a test", gates=("kl",))
    (tmp_path / "manifest.json").write_text(manifest.with_risk(risk).to_json())
    found = read_manifest(tmp_path / "manifest.json")
    assert (found.schema_version, found.accepted_risk) == (SCHEMA_VERSION, risk)
    assert {**found.facts(), "accepted_risk": None} == manifest.facts()
    assert "estimate" not in data_of(tmp_path / "manifest.json")
    assert manifest.accepted_risk is None
    assert manifest.to_json() == CALIBRATED.read_text(encoding="utf-8")


# --- in a store -------------------------------------------------------------------------------------------------------


def test_it_is_listed_shown_verified_and_kept(older: Artifact, tmp_path: Path, run: Run) -> None:
    store = Store(older.folder.parents[2])
    assert store.broken() == []
    listed = {item["variant"]: item for item in json.loads(run("list", "artifacts", "--json").stdout)}
    assert listed["q8_0"]["digest"] == older.manifest.digest
    assert listed["q8_0"]["vram_bytes"] > older.manifest.weights_bytes
    shown = json.loads(run("show", "tiny/q8_0", "--json").stdout)
    assert shown["manifest"] == data_of(older.folder / "manifest.json")
    assert shown["estimate"]["weights_bytes"] == older.manifest.weights_bytes
    assert older.manifest.digest in run("show", f"tiny/q8_0@{older.manifest.short_digest}").stdout
    for arguments in (["verify", "tiny/q8_0", "--hashes-only"], ["estimate", "tiny/q8_0"]):
        result = run(*arguments)
        assert result.exit_code == 0, (arguments, result.stderr)
    assert run("report", "tiny", "--output", tmp_path / "pages").exit_code == 0
    assert older.manifest.short_digest in (tmp_path / "pages" / "report.md").read_text()
    assert run("gc").stdout == "nothing to remove\n"


def test_it_differs_from_the_same_one_in_today_s_schema_in_nothing(older: Artifact, built: Built, run: Run) -> None:
    new = built.store.find("tiny/q8_0")
    assert (new.manifest.schema_version, older.manifest.schema_version) == (SCHEMA_VERSION, 1)
    assert new.manifest.digest != older.manifest.digest
    assert compare(older, new) == []
    assert run("diff", older.folder, new.folder).stdout == "no difference\n"


def test_it_is_served(older: Artifact) -> None:
    store = Store(older.folder.parents[2])
    target = resolve("tiny/q8_0", store)
    assert isinstance(target, LocalTarget)
    assert target.artifact == older
    wanted = Serving(device="cpu", slots=1, threads=1)
    engine = engine_target(target, wanted, place(target, wanted, Machine((), 16 * GIB, 15 * GIB, 4), (), store))
    with gateways() as served:
        name = target.name
        running = served(lambda watcher: {name: LocalEngine(engine, watcher.about(name))}, rules=Rules(name))
        answer = running.ask("POST", "/v1/completions", {"prompt": "The quick", "temperature": 0, "max_tokens": 4})
    assert answer.status == 200, answer.body
    assert answer.json["usage"]["completion_tokens"] > 0


def test_a_build_with_the_same_key_finds_it_up_to_date(older: Artifact, built: Built, tmp_path: Path) -> None:
    """What a manifest looks like is no input of a build: no weights are computed again to word it anew."""
    store = Store(older.folder.parents[2])
    workspace = Workspace(store, built.cache, ListReporter())
    (outcome,) = build(built.recipe, workspace, only=("q8_0",), evaluate=False)
    assert (outcome.state, outcome.artifact) == (OutcomeState.UP_TO_DATE, older)
    assert store.is_current(older)


def test_of_two_with_the_same_build_key_the_current_one_is_found(older: Artifact, built: Built) -> None:
    new = built.store.find("tiny/q8_0")
    beside = Path(shutil.copytree(new.folder, older.folder.with_name(new.folder.name)))
    for folder in (older.folder, beside):
        point_current(folder)
        found = Store(older.folder.parents[2]).find_build("tiny", "q8_0", new.manifest.build_key)
        assert found is not None
        assert found.folder == folder


def test_a_forced_build_puts_one_in_today_s_schema_beside_it(
    share: Path, tmp_path: Path, fake: FakeBuilder, run: Run
) -> None:
    pulled = pull(str(share / "older/int8"), Store(tmp_path / "artifacts"), Session(ListReporter())).artifact
    path = write_recipe(tmp_path / "older.yaml", tmp_path / "tiny", [{"format": "fake"}])
    assert run("build", path, "--force", "--no-eval").exit_code == 0
    new = Store(tmp_path / "artifacts").find("older/int8")
    assert (new.manifest.schema_version, new.folder.parent) == (SCHEMA_VERSION, pulled.folder.parent)
    assert new.manifest.files == pulled.manifest.files
    (found,) = json.loads(run("gc", "--json").stdout)
    assert (found["folder"], found["reason"]) == (str(pulled.folder), "superseded")


# --- rebuild ----------------------------------------------------------------------------------------------------------


def test_it_rebuilds_as_identical(share: Path, tmp_path: Path, run: Run) -> None:
    pulled = pull(str(share / "older/int8"), Store(tmp_path / "artifacts"), Session(ListReporter())).artifact
    result = run("rebuild", "older/int8", "--source", tmp_path / "tiny")
    assert result.exit_code == 0, result.stderr
    assert f"{pulled.ref}: identical (2 files, the digests differ, as its manifest is of schema 1 and " in result.stdout
    data = json.loads(run("rebuild", "older/int8", "--source", tmp_path / "tiny", "--json", "--quiet").stdout)
    assert (data["identical"], data["manifest_fields"], data["differences"]) == (True, [], [])
    assert data["digest"] == pulled.manifest.digest != data["rebuilt_digest"]


def test_a_better_vram_formula_changes_no_artifact(
    built: Built, tiny: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = built.copy(tmp_path / "artifacts").find("tiny/q8_0")
    before = memory_of(artifact)
    monkeypatch.setattr(vram, "_GPU_CONTEXT", dict.fromkeys(vram.RUNTIMES, (GIB, 2 * GIB)))
    after = memory_of(artifact)
    assert before is not None
    assert after is not None
    assert after.up_to(4096).expected_bytes > before.up_to(4096).expected_bytes + GIB // 2
    result = run("rebuild", "tiny/q8_0", "--source", tiny)
    assert result.exit_code == 0, result.stdout + result.stderr
    assert f": identical (2 files, {artifact.manifest.digest}, " in result.stdout


# --- publications -----------------------------------------------------------------------------------------------------


def test_a_publication_of_before_is_pulled(share: Path, tmp_path: Path, run: Run) -> None:
    store = Store(tmp_path / "artifacts")
    reporter = ListReporter()
    got = pull(f"{share}/older/int8@{(share / 'older/int8/current').read_text().strip()}", store, Session(reporter))
    data = data_of(PUBLISHED / "manifest.json")
    assert got.artifact.folder == variant_folder(store.root, "older", "int8") / data["digest"][7:19]
    assert (got.artifact.folder / "manifest.json").read_bytes() == (PUBLISHED / "manifest.json").read_bytes()
    assert store.artifacts() == [got.artifact]
    assert run("verify", "older/int8", "--hashes-only").exit_code == 0
    assert pull(f"{share}/older/int8", store, Session(reporter)).fetched_bytes == 0, "it is known and intact"


def test_an_artifact_of_before_is_published_and_pulled(older: Artifact, tmp_path: Path) -> None:
    done = publish_one(older, str(tmp_path / "out"), Session(ListReporter()))
    document = tmp_path / "out" / "tiny" / "q8_0" / short(done.digest) / "modelpack.json"
    assert data_of(document)["annotations"]["quantize.artifact.digest"] == older.manifest.digest
    statement = data_of(document.parent / "provenance.json")
    subjects = {item["name"]: item["digest"]["sha256"] for item in statement["subject"]}
    assert subjects["manifest.json"] == hashlib.sha256((older.folder / "manifest.json").read_bytes()).hexdigest()
    got = pull(done.reference, Store(tmp_path / "other"), Session(ListReporter()))
    assert got.artifact.manifest == older.manifest


# --- what a later version wrote ---------------------------------------------------------------------------------------


@pytest.fixture
def newer(older: Artifact) -> Artifact:
    """An artifact whose manifest is of a schema that is not known here, as its version would write it."""
    data = data_of(older.folder / "manifest.json")
    data = {**data, "schema_version": SCHEMA_VERSION + 1, "more": True}
    data["digest"] = digest_by_the_book(data)
    folder = older.folder.rename(older.folder.with_name(data["digest"][7:19]))
    (folder / "manifest.json").write_text(json.dumps(data))
    point_current(folder)
    return replace(older, folder=folder)


def test_a_newer_artifact_is_told_from_a_broken_one(newer: Artifact, run: Run) -> None:
    said = f"schema version 3 is newer than this program, which knows up to {SCHEMA_VERSION}"
    digest = newer.folder.name
    for word in ("tiny/q8_0", f"tiny/q8_0@{digest}", digest, f"@sha256:{digest}", newer.folder):
        result = run("show", word)
        assert (result.exit_code, said in result.stderr) == (3, True), word
        assert "upgrade quantize: the artifact itself is not damaged" in result.stderr
    with pytest.raises(NewerSchemaError, match=said):
        Store(newer.folder.parents[2]).find("tiny/q8_0")
    assert f"warning: {newer.folder}: {newer.folder}/manifest.json: {said}" in run("list", "artifacts").stderr
    assert "no artifact 'tiny/q8'" in run("show", "tiny/q8").stderr


def test_gc_keeps_what_is_newer(newer: Artifact, run: Run) -> None:
    (newer.folder.parent / "current").unlink()
    assert run("gc", "--delete").stdout == "nothing to remove\n"
    (newer.folder / "manifest.json").write_text("{}")
    assert run("gc", "--delete").stdout.splitlines()[-1].endswith("removed")
    assert not newer.folder.exists()
