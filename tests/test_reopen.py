"""A local source is found again wherever it may be, by its content; what is not the same is never taken for it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from quantize.build.find_source import find_source
from quantize.errors import CheckpointError, VerifyError
from quantize.events import SilentReporter
from quantize.model.source import pin_address
from quantize.store.artifact import Artifact, open_artifact
from quantize.store.manifest import RECIPE_NAME
from quantize.system.cache import Cache
from quantize.testing import TinyModel, make_checkpoint, write_recipe
from tests.conftest import Run

pytestmark = pytest.mark.usefixtures("fake")


@pytest.fixture
def artifact(tiny: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """Built in PROJECT from a recipe that names its source as `../models/tiny`; the store is in PROJECT."""
    project = tmp_path / "project"
    (project / "recipes").mkdir(parents=True)
    shutil.copytree(tiny, project / "models" / "tiny")
    write_recipe(project / "recipes" / "demo.yaml", Path("../models/tiny"), [{"format": "fake"}])
    monkeypatch.setenv("QUANTIZE_STORE", str(project / "artifacts"))
    assert run("build", project / "recipes" / "demo.yaml").exit_code == 0
    return open_artifact((project / "artifacts" / "demo" / "int8" / "current").resolve())


@pytest.fixture
def project(artifact: Artifact) -> Path:
    return artifact.folder.parents[3]


@pytest.fixture
def forgetful(tmp_path: Path) -> Cache:
    """A cache that has seen no file yet, as on another machine."""
    return Cache(tmp_path / "other-cache")


def find(artifact: Artifact, cache: Cache, given: Path | None = None) -> Path:
    return find_source(artifact, cache, SilentReporter(), given=given).location


def test_from_any_folder(
    artifact: Artifact, project: Path, forgetful: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (project / "recipes", project, tmp_path, Path("/")):
        monkeypatch.chdir(folder)
        assert find(artifact, forgetful) == project / "models" / "tiny"


def test_verify_from_elsewhere(artifact: Artifact, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    result = run("verify", "demo/int8")
    assert result.exit_code == 0, result.stderr


def test_a_moved_model_that_this_machine_has_hashed(
    artifact: Artifact, project: Path, cache: Cache, forgetful: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact went elsewhere too: nothing but the content leads there."""
    copied = open_artifact(Path(shutil.copytree(artifact.folder, tmp_path / "far" / "copy")))
    (project / "models" / "tiny").rename(tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").iterdir():
        cache.sha256(path)
    monkeypatch.chdir(tmp_path / "far")
    assert find(copied, cache) == tmp_path / "elsewhere"
    with pytest.raises(CheckpointError, match=r"its source local:tiny is not found\n  run this where .* --source PATH"):
        find(copied, forgetful)
    assert find_source(copied, forgetful, SilentReporter(), known=cache).location == tmp_path / "elsewhere"


def test_by_its_name_where_no_recipe_tells(
    artifact: Artifact, project: Path, forgetful: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    (artifact.folder / RECIPE_NAME).unlink()
    monkeypatch.chdir("/")
    with pytest.raises(CheckpointError, match="is not found"):
        find(artifact, forgetful)
    monkeypatch.chdir(project / "models")
    assert find(artifact, forgetful) == project / "models" / "tiny"


def test_another_model_under_that_name_is_not_taken(
    artifact: Artifact, project: Path, forgetful: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(project / "models")
    make_checkpoint(tmp_path / "models" / "tiny", TinyModel(seed=7))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(VerifyError, match=r"local:tiny is not the one that it was built from \(model\.saf.* differs\)"):
        find(artifact, forgetful)


def test_where_it_is_said_to_be(artifact: Artifact, forgetful: Cache, own_tiny: Path, tmp_path: Path, run: Run) -> None:
    """A folder of any name will do; the source keeps the name that the manifest has."""
    pinned = find_source(artifact, forgetful, SilentReporter(), given=own_tiny)
    source = artifact.manifest.source
    assert (pinned.location, pinned.uri, pinned.name) == (own_tiny, source.uri, source.name)
    with pytest.raises(CheckpointError, match=r"source .*/nowhere: no such file or folder"):
        find(artifact, forgetful, tmp_path / "nowhere")
    (own_tiny / "LICENSE").write_text("another")
    with pytest.raises(VerifyError, match=r"is not the one that it was built from \(LICENSE differs\)"):
        find(artifact, forgetful, own_tiny)
    assert run("verify", artifact.folder, "--source", own_tiny).exit_code == 3


def test_the_cache_forgets_what_has_changed(own_tiny: Path, cache: Cache) -> None:
    path = own_tiny / "config.json"
    digest = cache.sha256(path)
    assert cache.paths_with(digest) == [path]
    os.utime(path, ns=(0, 0))
    assert cache.paths_with(digest) == []
    path.unlink()
    assert cache.paths_with(digest) == []


@pytest.mark.parametrize(
    "uri", ["hub:org/name@main", "hub:org@0", "package:", "package:a/../b.gguf", "package:os", "other:x", "", "/etc"]
)
def test_addresses_that_are_none(uri: str, cache: Cache) -> None:
    with pytest.raises(CheckpointError):
        pin_address(uri, cache, SilentReporter())
