"""artifacts.lock, what the recipe lets out, and the two commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from quantize.errors import GateError, RecipeError, UsageError, VerifyError
from quantize.events import EventKind, ListReporter
from quantize.publish.pins import Pin, locked_words, pin, read_pins
from quantize.publish.policy import read_policy, required_notice
from quantize.publish.receive import pull, pull_pinned
from quantize.publish.transfer import Session
from quantize.recipe.model import PublishPolicy
from quantize.store.artifact import Artifact, commit, set_aside, write_measurements
from quantize.store.manifest import AcceptedRisk
from quantize.store.store import Store
from tests.conftest import Run
from tests.publish.conftest import publish_one
from tests.records import evaluation_record

STRICT = PublishPolicy()


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """artifacts.lock of a working folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "artifacts.lock"


def test_pins_are_the_same_whoever_writes_them(lock: Path, shelf: Store) -> None:
    first, second = shelf.find("tiny/q8_0"), shelf.find("tiny/q4_0")
    pin(lock, first, f"/share@sha256:{'1' * 64}")
    pin(lock, second, f"/share@sha256:{'2' * 64}")
    text = lock.read_text()
    pin(lock, first, f"/share@sha256:{'1' * 64}")
    assert lock.read_text() == text
    pin(lock, first, f"oci://h/r@sha256:{'1' * 64}")
    pin(lock, first, f"/share@sha256:{'3' * 64}")
    pins = read_pins(lock)
    assert [item.key for item in pins] == ["tiny/q4_0", "tiny/q8_0"]
    assert pins[1].published == (f"oci://h/r@sha256:{'1' * 64}", f"/share@sha256:{'3' * 64}")
    assert set(shelf.pinned()) >= {first.manifest.digest, second.manifest.digest}
    lock.write_text(text.replace(first.manifest.digest, f"sha256:{'4' * 64}"))
    pin(lock, first, f"/new@sha256:{'5' * 64}")
    assert read_pins(lock)[1].published == (f"/new@sha256:{'5' * 64}",), "another build is nowhere else"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not YAML"),
        ("artifacts: {}", "`artifacts`"),
        ("artifacts:\n- {name: a, variant: b, digest: x}", r"`artifacts.0.digest`"),
        ("artifacts:\n- {name: ../a, variant: b, digest: 'sha256:0123456789ab'}", r"`artifacts.0.name`"),
        ("artifacts:\n- {name: a, variant: b, digest: 'sha256:0123456789ab', more: 1}", r"`artifacts.0.more`"),
        ("artifacts:\n" + 2 * "- {name: a, variant: b, digest: 'sha256:0123456789ab'}\n", "a/b is pinned twice"),
    ],
)
def test_pins_that_can_not_be_read(text: str, message: str, lock: Path) -> None:
    lock.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_pins(lock)


def test_the_next_place_is_tried(
    artifact: Artifact, session: Session, reporter: ListReporter, store: Store, tmp_path: Path
) -> None:
    done = publish_one(artifact, str(tmp_path / "share"), session)
    gone = f"oci://127.0.0.1:9/gone@{done.digest}"
    wanted = Pin(name="tiny", variant="q8_0", digest=artifact.manifest.digest, published=(gone, done.reference))
    assert pull_pinned(wanted, store, session).artifact.manifest == artifact.manifest
    assert any("the next place is tried" in event.text for event in reporter.events if event.kind is EventKind.WARNING)
    with pytest.raises(UsageError, match="has no `published` places"):
        pull_pinned(wanted.model_copy(update={"published": ()}), store, session)


def test_a_pin_that_names_another_artifact(artifact: Artifact, session: Session, store: Store, tmp_path: Path) -> None:
    done = publish_one(artifact, str(tmp_path / "share"), session)
    for wanted in (
        Pin(name="tiny", variant="q8_0", digest=f"sha256:{'0' * 64}", published=(done.reference,)),
        Pin(name="tiny", variant="q4_0", digest=artifact.manifest.digest, published=(done.reference,)),
    ):
        with pytest.raises(VerifyError, match=f"it is tiny/q8_0 {artifact.manifest.digest}; .* is pinned as"):
            pull_pinned(wanted, store, session)
    assert store.artifacts() == []


def test_only_what_is_pinned_and_intact_is_served(lock: Path, artifact: Artifact, shelf: Store) -> None:
    pin(lock, artifact, f"/share@sha256:{'1' * 64}")
    digest = artifact.manifest.digest
    assert locked_words((), lock, shelf, ListReporter()) == (f"tiny/q8_0@{digest}",)
    assert locked_words(("chat=tiny/q8_0",), lock, shelf, ListReporter()) == (f"chat=tiny/q8_0@{digest}",)
    with pytest.raises(UsageError, match="tiny/q4_0 is not in"):
        locked_words(("tiny/q4_0",), lock, shelf, ListReporter())
    weights = artifact.folder / artifact.manifest.files[-1].path
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(VerifyError, match="was altered"):
        locked_words((), lock, shelf, ListReporter())
    lock.write_text(lock.read_text().replace(digest, f"sha256:{'0' * 64}"))
    with pytest.raises(UsageError, match="not in") as caught:
        locked_words((), lock, shelf, ListReporter())
    assert "quantize pull --locked" in str(caught.value.hint)


def judged(artifact: Artifact, verdict: str) -> Artifact:
    write_measurements(artifact.folder, {"evaluation": evaluation_record(verdict=verdict)})
    return artifact


def test_what_never_was_evaluated(artifact: Artifact) -> None:
    with pytest.raises(GateError, match="was never evaluated, so it is not published") as caught:
        required_notice(artifact, STRICT)
    assert "publish: {unevaluated: REASON}" in str(caught.value.hint)
    assert "without having been evaluated:** why" in required_notice(artifact, PublishPolicy(unevaluated="why"))


@pytest.mark.parametrize("verdict", ["accepted", "accepted with flags", "insufficient evidence"])
def test_what_its_gates_took(verdict: str, artifact: Artifact) -> None:
    assert required_notice(judged(artifact, verdict), STRICT) == ""


def test_what_its_gates_refused(artifact: Artifact, shelf: Store) -> None:
    aside = set_aside(shelf.root, judged(artifact, "refused").folder, artifact.manifest, "refused")
    with pytest.raises(GateError, match="was refused by its gates, so it is not published"):
        required_notice(aside, PublishPolicy(unevaluated="not this"))
    assert "its gates refused it:** why" in required_notice(aside, PublishPolicy(refused="why"))
    risk = AcceptedRisk(reason="known", gates=("max_kl",))
    taken = artifact.manifest.model_copy(update={"accepted_risk": risk}).sealed()
    assert required_notice(commit(shelf.root, aside.folder, taken), STRICT) == "", "its manifest says so"


def test_the_policy_is_the_recipe_s(artifact: Artifact, tmp_path: Path) -> None:
    path = artifact.folder / "recipe.yaml"
    assert read_policy(path) == STRICT
    path.write_text(path.read_text() + "publish: {unevaluated: a draft}\n")
    assert read_policy(path) == PublishPolicy(unevaluated="a draft")
    path.write_text(path.read_text().replace("unevaluated", "unevaluatd"))
    with pytest.raises(RecipeError, match="unknown key `unevaluatd`"):
        read_policy(path)


def test_the_commands(artifact: Artifact, shelf: Store, lock: Path, run: Run, tmp_path: Path, store: Store) -> None:
    refused = run("publish", "tiny/q8_0", "--to", tmp_path / "share", "--store", shelf.root)
    assert (refused.exit_code, "was never evaluated" in refused.stderr) == (3, True)
    assert not (tmp_path / "share").exists()
    recipe = artifact.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "publish: {unevaluated: a draft}\n")
    result = run("publish", "tiny/q8_0", "--to", tmp_path / "share", "--store", shelf.root, "--json")
    assert result.exit_code == 0, result.stderr
    (done,) = json.loads(result.stdout)
    assert yaml.safe_load(lock.read_text())["artifacts"] == [
        {"name": "tiny", "variant": "q8_0", "digest": artifact.manifest.digest, "published": [done["reference"]]}
    ]
    again = run("publish", "tiny/q8_0", "--to", tmp_path / "share", "--store", shelf.root)
    assert again.stdout == f"{artifact.ref}  {done['reference']}  (was there)\n"
    named = run("pull", done["name"])
    assert named.exit_code == 0, named.stderr
    assert f"means {done['digest']}" in named.stderr
    assert "not evaluated: its card says why" in named.stderr
    assert "without having been evaluated:** a draft" in (store.find("tiny/q8_0").folder / "README.md").read_text()
    assert "(was there)" in run("pull", "--locked").stdout
    assert run("verify", "--hashes-only").exit_code == 0
    nothing = run("pull")
    assert (nothing.exit_code, "nothing to pull" in nothing.stderr) == (2, True)


def test_measurements_that_would_break_their_readers(
    artifact: Artifact, session: Session, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(item: Artifact, *_: object, **__: object) -> None:
        write_measurements(item.folder, {"evaluation": {"quality": []}})

    monkeypatch.setattr("quantize.publish.send.prepare", prepare)
    done = publish_one(artifact, str(tmp_path / "share"), session)
    with pytest.raises(VerifyError, match=r"measurements\.json is not of the form"):
        pull(done.reference, store, session)
    assert store.artifacts() == []
