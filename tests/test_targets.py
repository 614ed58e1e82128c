"""What a word on the command line means: each kind by each of its forms, and an error that says what it is instead."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from quantize.errors import UsageError, VerifyError
from quantize.store.store import Store
from quantize.system.lookup import DATA
from quantize.targets import (
    AddressTarget,
    ArtifactTarget,
    FileTarget,
    FolderTarget,
    RecipeTarget,
    SpecTarget,
    TargetKind,
    find_artifact,
    find_target,
)
from tests.conftest import Built, Run

Kinds = tuple[type[TargetKind], ...]
ALL: Kinds = (RecipeTarget, ArtifactTarget, FileTarget, FolderTarget, AddressTarget, SpecTarget)
MODELS: Kinds = (ArtifactTarget, FileTarget, FolderTarget, AddressTarget)


@pytest.fixture
def here(built: Built, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in: two recipes, a spec, a model's folder and file, something else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    for name in ("mine.yaml", "cafe.yaml"):
        (tmp_path / "recipes" / name).write_text("{name: x, variants: []}\n")
    (tmp_path / "text.yaml").write_text("{dataset: python-docs}\n")
    shutil.copytree(tiny, tmp_path / "model")
    (file,) = find_artifact("tiny/q8_0", built.store).folder.glob("*.gguf")
    (tmp_path / "model.gguf").symlink_to(file)
    (tmp_path / "notes.txt").write_text("not a model\n")
    (tmp_path / "empty").mkdir()
    return tmp_path


def kind_of(text: str, store: Store, kinds: Kinds = ALL) -> type[TargetKind]:
    return type(find_target(text, store, kinds))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("recipes/mine.yaml", RecipeTarget),
        ("not-there.yml", RecipeTarget),
        ("mine", RecipeTarget),
        ("smollm2-135m", RecipeTarget),
        ("builtin:smollm2-135m", RecipeTarget),
        ("tiny/q8_0", ArtifactTarget),
        ("model", FolderTarget),
        ("model.gguf", FileTarget),
        ("http://127.0.0.1:8000/v1#model", AddressTarget),
        ("oci://somewhere/x", AddressTarget),
        ("text.yaml", SpecTarget),
        ("ultrachat", SpecTarget),
    ],
)
def test_each_kind_by_each_form(text: str, kind: type[TargetKind], here: Path, built: Built) -> None:
    assert kind_of(text, built.store) is kind


def test_an_artifact_by_every_reference(here: Path, built: Built) -> None:
    artifact = built.store.find("tiny/q8_0")
    digits = artifact.manifest.digest.partition(":")[2]
    far = Path(shutil.copytree(artifact.folder, here / "far"))
    for text in (f"tiny/q8_0@{digits[:6]}", digits, digits[:8], artifact.manifest.digest, str(artifact.folder), "far"):
        assert find_artifact(text, built.store).manifest == artifact.manifest, text
    (far / "manifest.json").write_text("{")
    with pytest.raises(VerifyError):
        find_artifact("far", built.store)


@pytest.mark.parametrize(
    ("text", "kinds", "message", "hint"),
    [
        ("mine", (ArtifactTarget,), "'mine' is a recipe", "give an artifact's name/variant"),
        ("tiny/q8_0", (RecipeTarget,), "'tiny/q8_0' is an artifact", "give a recipe's file or name"),
        ("model", (RecipeTarget,), "'model' is a model's folder", "give a recipe's file or name"),
        ("model.gguf", (ArtifactTarget, RecipeTarget), "'model.gguf' is a model's file", "digest, or its folder or a"),
        ("http://host", (ArtifactTarget,), "'http://host' is an address", "give an artifact's"),
        ("text.yaml", (ArtifactTarget,), "'text.yaml' is a recipe", "give an artifact's"),
        ("mine", MODELS, "'mine' is a recipe", "a model's file, a model's folder"),
        ("notes.txt", MODELS, "notes.txt: not a file of any installed format", "give an artifact's"),
        ("empty", MODELS, "empty: a folder with neither manifest.json nor config.json", "give an artifact's"),
        ("minee", (ArtifactTarget, RecipeTarget), "no artifact or recipe 'minee'", "did you mean `mine`"),
        ("minee", (RecipeTarget,), "no recipe 'minee'", "did you mean `mine`"),
        ("tiny/none", (ArtifactTarget,), "no artifact 'tiny/none'", "there are: tiny/"),
    ],
)
def test_another_kind_is_refused_by_name(
    text: str, kinds: Kinds, message: str, hint: str, here: Path, built: Built
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        find_target(text, built.store, kinds)
    assert hint in (caught.value.hint or "")


def test_what_could_be_a_digest_is_no_recipe_s_name(here: Path, built: Built) -> None:
    """A recipe may be called `cafe`; where an artifact may be meant, it is."""
    assert kind_of("cafe", built.store, (RecipeTarget,)) is RecipeTarget
    with pytest.raises(UsageError, match="no recipe or artifact 'cafe'"):
        find_target("cafe", built.store, (RecipeTarget, ArtifactTarget))


def test_a_folder_of_a_recipe_s_name(here: Path, built: Built) -> None:
    """Hides no recipe where only one can be meant; is itself where a folder may be."""
    (here / "model").rename(here / "smollm2-135m")
    found = find_target("smollm2-135m", built.store, (RecipeTarget,))
    assert found.path.is_relative_to(DATA)
    assert kind_of("smollm2-135m", built.store) is FolderTarget


def test_a_folder_hides_no_artifact(here: Path, built: Built) -> None:
    (here / "tiny").mkdir()
    (here / "model").rename(here / "tiny" / "q8_0")
    assert kind_of("tiny/q8_0", built.store, (ArtifactTarget,)) is ArtifactTarget
    assert kind_of("tiny/q8_0", built.store, MODELS) is FolderTarget


@pytest.mark.parametrize("text", ["", "..", "/", "@", "a" * 5000, "x\0y", "=", "://", "builtin:"])
def test_nonsense_is_refused(text: str, here: Path, built: Built) -> None:
    with pytest.raises(UsageError):
        find_target(text, built.store, (RecipeTarget, ArtifactTarget, FileTarget, FolderTarget))


def test_commands_say_what_they_take(here: Path, built: Built, run: Run) -> None:
    for words, message in (
        (["show", "mine"], "'mine' is a recipe"),
        (["build", "tiny/q8_0"], "'tiny/q8_0' is an artifact"),
        (["plan", "model"], "'model' is a model's folder"),
        (["bench", "model.gguf"], "'model.gguf' is a model's file"),
        (["eval", "http://127.0.0.1:1"], "'http://127.0.0.1:1' is an address"),
        (["calibration", "show", "model.gguf"], "'model.gguf' is a model's file"),
    ):
        store = [] if words[0] in {"plan", "calibration"} else ["--store", built.store.root]
        result = run(*words, *store)
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        assert message in result.stderr
