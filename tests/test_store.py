"""The store: commits that are whole or not there, references, pins, gc, and builds that meet each other."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantize.build.execution import RunOptions
from quantize.build.outcome import Outcome
from quantize.errors import BuildError, DiskFullError, GateError, PlanError, StoreError, UsageError, VerifyError
from quantize.events import EventKind, ListReporter, SilentReporter
from quantize.formats import option_models
from quantize.formats.diff import compare
from quantize.recipe.model import Recipe, load_recipe
from quantize.store.artifact import commit, point_current
from quantize.store.manifest import Manifest, manifest_schema, read_manifest
from quantize.store.staging import RESUME_NAME, variant_lock, workplace
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.testing import FakeBuilder, write_recipe
from tests.conftest import Built, Run, build

Variants = list[dict[str, object]]
INT8: Variants = [{"format": "fake"}]


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path, fake: FakeBuilder) -> Callable[[Variants], Recipe]:
    """Recipes for the fake format."""

    def make(variants: Variants) -> Recipe:
        return load_recipe(write_recipe(tmp_path / "demo.yaml", tiny, variants), option_models())

    return make


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and link under a folder, with its time and content."""
    return {
        str(path.relative_to(root)): (path.lstat().st_mtime_ns, os.readlink(path).encode())
        if path.is_symlink()
        else (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in root.rglob("*")
    }


def build_all(
    recipe: Recipe, store: Store, cache: Cache, run: RunOptions | None = None, **choice: Any
) -> list[Outcome]:
    return build(recipe, Workspace(store, cache, SilentReporter()), run, **choice)


# --- build and commit -------------------------------------------------------------------------------------------------


def test_what_a_build_leaves(recipe: Callable[[Variants], Recipe], store: Store, cache: Cache) -> None:
    (outcome,) = build_all(recipe(INT8), store, cache)
    assert outcome.artifact is not None
    folder = outcome.artifact.folder
    names = {"LICENSE", "README.md", "manifest.json", "measurements.json", "model.safetensors", "recipe.yaml"}
    assert {path.name for path in folder.iterdir()} == names
    assert {path.name for path in store.root.iterdir()} == {"demo"}, "no staging, no locks, nothing else"
    assert os.readlink(folder.parent / "current") == folder.name
    assert (folder / "recipe.yaml").read_bytes() == recipe(INT8).path.read_bytes()
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert "base_model_relation" not in front, "the recipe does not say of which model"


def test_a_second_build_does_nothing(
    recipe: Callable[[Variants], Recipe], store: Store, cache: Cache, fake: FakeBuilder
) -> None:
    build_all(recipe(INT8), store, cache)
    before = snapshot(store.root)
    (outcome,) = build_all(recipe(INT8), store, cache)
    assert (outcome.state, fake.built, snapshot(store.root)) == ("up to date", ["int8"], before)


def test_force_builds_again_and_ends_at_the_same_digest(
    recipe: Callable[[Variants], Recipe], store: Store, cache: Cache, fake: FakeBuilder
) -> None:
    (first,) = build_all(recipe(INT8), store, cache)
    (second,) = build_all(recipe(INT8), store, cache, force=True)
    assert fake.built == ["int8", "int8"]
    assert first.artifact is not None
    assert second.artifact is not None
    assert first.artifact.manifest == second.artifact.manifest
    assert len(list(store.folders())) == 1


@pytest.mark.parametrize("step", ["check", "build", "verify"])
def test_one_failure_does_not_end_the_others(
    step: str, recipe: Callable[[Variants], Recipe], store: Store, cache: Cache
) -> None:
    failing: dict[str, object] = {"format": "fake", "bits": 4, "fail": step}
    outcomes = build_all(recipe([failing, *INT8]), store, cache)
    assert [item.state for item in outcomes] == ["refused" if step == "verify" else "failed", "built"]
    assert type(outcomes[0].error) is {"check": PlanError, "build": BuildError, "verify": GateError}[step]
    assert [item.manifest.variant for item in store.artifacts()] == ["int8"]
    left = {path.name for path in store.root.rglob("*") if f"-{step}" in path.name}
    assert left == ({"int4-verify"} if step == "verify" else set()), "what was built and refused is kept aside"


def test_fail_fast_skips_the_rest(recipe: Callable[[Variants], Recipe], store: Store, cache: Cache) -> None:
    failing: dict[str, object] = {"format": "fake", "bits": 4, "fail": "build"}
    outcomes = build_all(recipe([failing, *INT8]), store, cache, RunOptions(keep_going=False))
    assert [item.state for item in outcomes] == ["failed", "skipped"]
    assert not store.root.exists()


def test_only_some_variants(recipe: Callable[[Variants], Recipe], store: Store, cache: Cache) -> None:
    both = recipe([*INT8, {"format": "fake", "bits": 4}])
    assert [item.variant for item in build_all(both, store, cache, only=("int4",))] == ["int4"]
    with pytest.raises(UsageError, match="the recipe has no variant 'int3'") as caught:
        build_all(both, store, cache, only=("int3",))
    assert caught.value.hint == "it has: int8, int4"


def test_a_digest_stands_for_content_alone(
    recipe: Callable[[Variants], Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = set()
    for name in ("one", "two"):
        monkeypatch.chdir(tmp_path)
        (outcome,) = build_all(recipe(INT8), Store(tmp_path / name), Cache(tmp_path / f"{name}-cache"))
        assert outcome.artifact is not None
        digests.add((outcome.artifact.folder / "manifest.json").read_bytes())
    assert len(digests) == 1
    assert str(tmp_path).encode() not in next(iter(digests))


def test_another_version_of_a_tool_is_another_build(
    recipe: Callable[[Variants], Recipe], store: Store, cache: Cache, monkeypatch: pytest.MonkeyPatch, fake: FakeBuilder
) -> None:
    build_all(recipe(INT8), store, cache)
    versions = {"numpy": "99.0", "quantize": "99.0"}
    monkeypatch.setattr(import_module("quantize.build.plan"), "tool_versions", lambda _: versions)
    (outcome,) = build_all(recipe(INT8), store, cache)
    assert (outcome.state, fake.built) == ("built", ["int8", "int8"])


def test_a_truncated_artifact_is_built_again(recipe: Callable[[Variants], Recipe], store: Store, cache: Cache) -> None:
    (first,) = build_all(recipe(INT8), store, cache)
    assert first.artifact is not None
    os.truncate(first.artifact.folder / "model.safetensors", 100)
    (second,) = build_all(recipe(INT8), store, cache)
    assert second.state == "built"
    assert (first.artifact.folder / "model.safetensors").stat().st_size > 100, "the good copy must take its place"


def test_a_folder_with_a_broken_manifest_makes_room(
    recipe: Callable[[Variants], Recipe], store: Store, cache: Cache
) -> None:
    (first,) = build_all(recipe(INT8), store, cache)
    assert first.artifact is not None
    (first.artifact.folder / "manifest.json").unlink()
    (second,) = build_all(recipe(INT8), store, cache)
    assert second.artifact is not None
    assert read_manifest(second.artifact.folder / "manifest.json") == first.artifact.manifest


def test_a_commit_that_fails_leaves_what_was_there(
    recipe: Callable[[Variants], Recipe], store: Store, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_all(recipe(INT8), store, cache)
    before = snapshot(store.root)

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("quantize.store.artifact.sync", full)
    (outcome,) = build_all(recipe([{"format": "fake", "bits": 4}]), store, cache)
    assert isinstance(outcome.error, DiskFullError)
    assert "No space left on device" in outcome.error.message
    assert "run the same build again" in str(outcome.error.hint)
    assert snapshot(store.root).keys() == before.keys()


def test_a_store_that_can_not_be_written_says_so(
    recipe: Callable[[Variants], Recipe], tmp_path: Path, cache: Cache
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"store .*file/artifacts: Not a directory"):
        build_all(recipe(INT8), Store(tmp_path / "file" / "artifacts"), cache)


# --- two builds at once ---------------------------------------------------------------------------------------------


def test_two_builds_of_one_variant_make_it_once(
    recipe: Callable[[Variants], Recipe], store: Store, cache: Cache, fake: FakeBuilder
) -> None:
    parsed = recipe([{"format": "fake", "bits": bits} for bits in (4, 6, 8)])
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda _: build_all(parsed, store, cache), range(4)))
    assert sorted(fake.built) == ["int4", "int6", "int8"]
    states = [outcome.state for outcomes in runs for outcome in outcomes]
    assert (states.count("built"), states.count("up to date")) == (3, 9)
    assert {path.name for path in store.root.iterdir()} == {"demo"}


def test_a_lock_is_held_by_one_at_a_time_though_its_file_goes(tmp_path: Path) -> None:
    inside, most, rounds = 0, 0, 0
    guard = threading.Lock()

    def enter(_: int) -> None:
        nonlocal inside, most, rounds
        with variant_lock(tmp_path / "store", "name", "variant"):
            with guard:
                inside, rounds = inside + 1, rounds + 1
                most = max(most, inside)
            time.sleep(0.002)
            with guard:
                inside -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(24)))
    assert (most, rounds) == (1, 24)
    assert not (tmp_path / "store").exists()


def test_what_a_killed_build_left_is_cleared_but_nobody_elses(tmp_path: Path) -> None:
    root = tmp_path / ".staging"
    for name in ("r--q8.work", "r--q8.work.scratch", "r--q8.00000000.scratch", "r--q8.x.work", "r--q8-pure.work"):
        (root / name).mkdir(parents=True)
        (root / name / "file").touch()
    with workplace(tmp_path, "r", "q8", {"a": 1}, anew=False) as place:
        assert [*place.staging.iterdir()] == []
        assert {path.name for path in root.iterdir()} == {
            place.staging.name, place.scratch.name, "r--q8.x.work", "r--q8-pure.work",
        }  # fmt: skip
    assert {path.name for path in root.iterdir()} == {"r--q8.x.work", "r--q8-pure.work"}


def stopped(root: Path, inputs: dict[str, Any]) -> None:
    """A build that has something to go on from, and ends before it is done."""
    with contextlib.suppress(KeyboardInterrupt), workplace(root, "r", "q8", inputs, anew=False) as place:
        (place.staging / "half").touch()
        (place.scratch / RESUME_NAME).write_text("{}")
        raise KeyboardInterrupt


def test_a_stopped_build_with_the_same_inputs_finds_its_work(tmp_path: Path) -> None:
    stopped(tmp_path, {"tools": {"torch": "1"}})
    with workplace(tmp_path, "r", "q8", {"tools": {"torch": "1"}}, anew=False) as place:
        assert (place.changed, (place.staging / "half").exists()) == ((), True)
        place.staging.rename(tmp_path / "committed")
    assert not (tmp_path / ".staging").exists()


@pytest.mark.parametrize(
    ("inputs", "anew", "changed"),
    [
        ({"tools": {"torch": "2"}}, False, ('tools.torch was "1", is "2"',)),
        ({"tools": {}}, False, ('tools.torch was "1", is null',)),
        ({"tools": {"torch": "1"}}, True, ()),
    ],
)
def test_a_stopped_build_of_other_inputs_starts_over_and_says_why(
    tmp_path: Path, inputs: dict[str, Any], anew: bool, changed: tuple[str, ...]
) -> None:
    stopped(tmp_path, {"tools": {"torch": "1"}})
    with workplace(tmp_path, "r", "q8", inputs, anew=anew) as place:
        assert (place.changed, [*place.staging.iterdir()]) == (changed, [])
    assert not (tmp_path / ".staging").exists()


# --- gc and pins ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_builds(
    recipe: Callable[[Variants], Recipe], store: Store, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> tuple[Manifest, Manifest]:
    """A superseded build and the current one, of one variant."""
    build_all(recipe(INT8), store, cache)
    (old,) = store.artifacts()
    with monkeypatch.context() as patch:
        patch.setattr(import_module("quantize.build.plan"), "tool_versions", lambda _: {"numpy": "99.0"})
        build_all(recipe(INT8), store, cache)
    (new,) = [item for item in store.artifacts() if store.is_current(item)]
    return old.manifest, new.manifest


def test_gc_shows_and_touches_nothing(two_builds: tuple[Manifest, Manifest], store: Store, run: Run) -> None:
    (store.root / ".staging" / "demo--int8.01234567").mkdir(parents=True)
    before = snapshot(store.root)
    shown = json.loads(run("gc", "--json").stdout)
    assert [(Path(item["folder"]).name, item["reason"], item["removed"]) for item in shown] == [
        (two_builds[0].short_digest, "superseded", False),
        ("demo--int8.01234567", "left by a killed build", False),
    ]
    assert snapshot(store.root) == before


def test_gc_delete_keeps_the_current_one(two_builds: tuple[Manifest, Manifest], store: Store, run: Run) -> None:
    (store.root / ".staging" / "demo--int8.01234567").mkdir(parents=True)
    result = run("gc", "--delete")
    assert result.exit_code == 0
    assert "removed" in result.stdout
    assert [item.manifest.digest for item in store.artifacts()] == [two_builds[1].digest]
    assert not any((store.root / ".staging").glob("*"))
    assert run("gc").stdout == "nothing to remove\n"


@pytest.mark.parametrize("form", ["sha256:0", "sha256:0 shortened", "0 shortened"])
@pytest.mark.parametrize("place", ["beside the store", "working folder"])
def test_gc_keeps_what_is_pinned(
    form: str, place: str, two_builds: tuple[Manifest, Manifest], store: Store, run: Run, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    folder = store.root.parent if place == "beside the store" else tmp_path / "work"
    digest = two_builds[0].digest[: 19 if form.endswith("shortened") else None].removeprefix("sha256:")
    prefix = "sha256:" if form.startswith("sha256:") else ""
    (folder / "artifacts.lock").write_text(f"artifacts:\n  - {{digest: '{prefix}{digest}'}}\n")
    assert run("gc", "--delete").stdout == "nothing to remove\n"
    assert len(store.artifacts()) == 2


@pytest.mark.parametrize("text", ["artifacts: 3\n", "[", "artifacts: [{name: x}]\n", "artifacts: [{digest: abc}]\n"])
def test_gc_stops_at_a_lock_file_that_it_can_not_read(
    text: str, two_builds: tuple[Manifest, Manifest], store: Store, run: Run
) -> None:
    (store.root.parent / "artifacts.lock").write_text(text)
    result = run("gc", "--delete")
    assert result.exit_code == 2
    assert "artifacts.lock: can't be read, so nothing is removed" in result.stderr
    assert len(store.artifacts()) == 2


def test_gc_leaves_the_folders_of_a_running_build(store: Store, run: Run) -> None:
    with variant_lock(store.root, "demo", "int8"), workplace(store.root, "demo", "int8", {}, anew=False) as place:
        assert run("gc", "--delete").stdout == "nothing to remove\n"
        assert place.staging.is_dir()
        assert place.scratch.is_dir()


def test_gc_removes_broken_folders_but_not_the_current_one(
    two_builds: tuple[Manifest, Manifest], store: Store, run: Run
) -> None:
    for manifest in two_builds:
        path = store.root / "demo" / "int8" / manifest.short_digest / "manifest.json"
        path.write_text(path.read_text().replace('"int8"', '"int9"'))
    assert len(store.broken()) == 2
    run("gc", "--delete")
    assert [item.folder.name for item in store.broken()] == [two_builds[1].short_digest]


# --- references and listings ------------------------------------------------------------------------------------------


def test_find(two_builds: tuple[Manifest, Manifest], store: Store) -> None:
    old, new = two_builds
    for ref in ("demo/int8", new.digest, new.short_digest, new.digest[7:12], f"demo/int8@{new.short_digest}"):
        assert store.find(ref).manifest == new, ref
    assert store.find(f"demo/int8@{old.digest}").manifest == old
    assert [item.manifest for item in store.matches(f"demo/int8@{old.short_digest}")] == [old]


@pytest.mark.parametrize("ref", ["demo/int4", "nothing", "demo/int8@ffff", "abc", "", "@", "/", "demo"])
def test_find_nothing(ref: str, two_builds: tuple[Manifest, Manifest], store: Store) -> None:
    with pytest.raises(UsageError, match="no artifact") as caught:
        store.find(ref)
    assert caught.value.hint == "there are: demo/int8"


def test_find_in_an_empty_store(store: Store) -> None:
    with pytest.raises(UsageError, match="no artifact 'demo/int8'") as caught:
        store.find("demo/int8")
    assert caught.value.hint == f"the store {store.root} is empty"


def test_find_more_than_one(built: Built) -> None:
    digests = [item.manifest.digest.removeprefix("sha256:") for item in built.store.artifacts()]
    assert len(digests) == len(set(digests)) > 2
    with pytest.raises(UsageError, match="means 2 artifacts") as caught:
        _Twice(built.store.root).find("demo")
    assert caught.value.hint == "give more of the digest"


class _Twice(Store):
    """A store whose every reference is ambiguous."""

    def find(self, ref: str) -> object:  # type: ignore[override]
        self.artifacts = lambda: [item for item in Store.artifacts(self)[:1] for _ in range(2)]  # type: ignore[method-assign]
        return super().find(self.artifacts()[0].manifest.digest[:14])


def test_list_show_and_diff(two_builds: tuple[Manifest, Manifest], store: Store, run: Run) -> None:
    old, new = two_builds
    listed = json.loads(run("list", "artifacts", "--json").stdout)
    assert [(item["digest"], item["vram_bytes"]) for item in listed] == [(new.digest, None)], "it has no config.json"
    assert {item["digest"] for item in json.loads(run("list", "artifacts", "--all", "--json").stdout)} == {
        old.digest, new.digest,
    }  # fmt: skip
    table = run("list", "artifacts").stdout
    assert "DIGEST" in table
    assert new.short_digest in table
    shown = json.loads(run("show", "demo/int8", "--json").stdout)
    assert (shown["manifest"], shown["estimate"]) == (new.to_data(), None)
    assert (
        "no estimate: the format is not installed here, or its files can't be read" in run("show", "demo/int8").stdout
    )
    assert shown["measurements"]["verify"] == {"runtime": "none"}
    assert new.digest in run("show", "demo/int8").stdout
    differences = json.loads(run("diff", f"@{old.digest}", "demo/int8", "--json").stdout)
    changed = {item["what"] for item in differences}
    assert "tools.numpy" in changed
    assert not any(what.startswith(("tensor ", "options", "source", "file model")) for what in changed)
    assert run("diff", "demo/int8", "demo/int8").stdout == "no difference\n"


def test_diff_sees_settings_files_and_tensor_types(built: Built) -> None:
    items = {item.manifest.variant: item for item in built.store.artifacts()}
    found = {item.what: (item.first, item.second) for item in compare(items["q8_0"], items["f16"])}
    assert found["options.type"] == ("Q8_0", "F16")
    assert found["tensor token_embd.weight"] == ("Q8_0 (104,448 B)", "F16 (196,608 B)")
    assert found["file tiny-F16.gguf"][0] is None
    assert "tensor output_norm.weight" not in found


def test_list_warns_of_broken_folders(two_builds: tuple[Manifest, Manifest], store: Store, run: Run) -> None:
    folder = store.root / "demo" / "int8" / two_builds[0].short_digest
    (folder / "manifest.json").write_text("{}")
    result = run("list", "artifacts")
    assert f"warning: {folder}: {folder}/manifest.json: no `schema_version`" in result.stderr
    assert result.exit_code == 0


def test_a_renamed_folder_is_broken(two_builds: tuple[Manifest, Manifest], store: Store) -> None:
    folder = store.root / "demo" / "int8" / two_builds[0].short_digest
    folder.rename(folder.with_name("0" * 12))
    assert [item.reason for item in store.broken()] == ["the folder's name is not its manifest's digest"]


def test_an_empty_store_lists_nothing(run: Run, store: Store) -> None:
    assert run("list", "artifacts").stdout == f"no artifacts in {store.root}/; see `quantize build`\n"
    assert run("list", "artifacts", "--json").stdout == "[]\n"


def test_current_moves_in_one_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        point_current(tmp_path / name)
        assert os.readlink(tmp_path / "current") == name
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "current"}


def test_a_commit_of_what_is_there_keeps_the_older_folder(
    two_builds: tuple[Manifest, Manifest], store: Store, tmp_path: Path
) -> None:
    old, _ = two_builds
    folder = store.root / "demo" / "int8" / old.short_digest
    staging = Path(shutil.copytree(folder, tmp_path / "staging"))
    before = (folder / "model.safetensors").stat().st_ino
    commit(store.root, staging, old)
    assert (folder / "model.safetensors").stat().st_ino == before
    assert os.readlink(folder.parent / "current") == folder.name


# --- the manifest -----------------------------------------------------------------------------------------------------


def test_the_manifest_fits_its_schema_and_hashes(built: Built) -> None:
    import hashlib

    import jsonschema
    import rfc8785

    schema = manifest_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for item in built.store.artifacts():
        data = json.loads((item.folder / "manifest.json").read_text())
        jsonschema.validate(data, schema)
        for entry in data["files"]:
            raw = (item.folder / entry["path"]).read_bytes()
            assert (entry["size_bytes"], entry["sha256"]) == (len(raw), hashlib.sha256(raw).hexdigest())
        digest = data.pop("digest")
        assert digest == "sha256:" + hashlib.sha256(rfc8785.dumps(data)).hexdigest()
        assert item.folder.name == digest[7:19]
        with pytest.raises(jsonschema.ValidationError, match="'size_bytes' is a required property"):
            jsonschema.validate({**data, "files": [{"path": "a", "sha256": "b"}], "digest": digest}, schema)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: {**data, "bits": 3}, "altered: its content does not have the digest that it states"),
        (lambda data: {**data, "schema_version": 99}, "schema version 99 is newer than this program"),
        (lambda data: {**data, "more": 1}, "`more`: Extra inputs are not permitted"),
        (lambda data: {key: data[key] for key in data if key != "tools"}, "`tools`: Field required"),
        (lambda data: [data], "no `schema_version`"),
    ],
)
def test_a_manifest_that_was_changed(
    change: Callable[[dict[str, object]], object], message: str, built: Built, tmp_path: Path
) -> None:
    item = built.store.artifacts()[0]
    data = json.loads((item.folder / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(change(data)))
    with pytest.raises(VerifyError, match=f"manifest.json: {message}"):
        read_manifest(tmp_path / "manifest.json")


def test_events_of_a_build(recipe: Callable[[Variants], Recipe], store: Store, cache: Cache) -> None:
    events = ListReporter()
    build(recipe(INT8), Workspace(store, cache, events))
    kinds = [event.kind for event in events.events if event.subject == "int8"]
    assert kinds[-2:] == [EventKind.NOTE, EventKind.DONE], "the last word before the end: nothing was measured"


def test_folders_that_others_remove_because_they_are_empty_are_made_again(tmp_path: Path) -> None:
    root, stop = tmp_path / "store", threading.Event()

    def remove() -> None:
        while not stop.is_set():
            for folder in (root / ".locks", root / ".staging", root):
                with contextlib.suppress(OSError):
                    folder.rmdir()

    remover = threading.Thread(target=remove)
    remover.start()
    try:
        for _ in range(300):
            with variant_lock(root, "name", "variant"), workplace(root, "name", "variant", {}, anew=False) as place:
                (place.staging / "file").write_text("x")
    finally:
        stop.set()
        remover.join()
    assert not root.exists()


def test_an_up_to_date_build_makes_good_what_a_kill_after_its_commit_left(built: Built, tmp_path: Path) -> None:
    store = built.copy(tmp_path / "left")
    artifact = next(item for item in store.artifacts() if store.is_current(item))
    name = f"{artifact.manifest.name}--{artifact.manifest.variant}"
    scratch = store.root / ".staging" / f"{name}.0a1b2c3d.scratch"
    scratch.mkdir(parents=True)
    lock = store.root / ".locks" / f"{name}.lock"
    lock.parent.mkdir()
    lock.touch()
    (artifact.folder.parent / "current").unlink()
    build_all(built.recipe, store, built.cache, evaluate=False)
    assert store.is_current(artifact)
    assert not scratch.exists()
    assert not lock.exists()
