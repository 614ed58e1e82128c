"""One contract for every target: complete or not there, sent once, tags that stay, and nothing taken on trust."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest

from quantize.errors import RefusedError, TransferError, UsageError, VerifyError
from quantize.events import EventKind, ListReporter
from quantize.publish import places
from quantize.publish.pack import MANIFEST_NAME
from quantize.publish.receive import pull
from quantize.publish.send import Published, Wanted, publish
from quantize.publish.transfer import Session
from quantize.store.artifact import Artifact
from quantize.store.store import Store
from tests.publish import drawer
from tests.publish.conftest import POLICY, Registry, publish_one
from tests.publish.hub_server import TOKEN, Hub

# huggingface_hub uploads in a way that its own HTTP client has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@dataclass
class Target:
    """A target under test. text: what goes after --to; alter: changes the bytes of one published file."""

    text: str
    alter: Callable[[Published, str, Callable[[bytes], bytes]], None]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    constants = pytest.importorskip("huggingface_hub.constants")
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield server
    server.close()


def make_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    share = tmp_path / "share"

    def alter(done: Published, path: str, change: Callable[[bytes], bytes]) -> None:
        file = Path(done.name) / done.digest.removeprefix("sha256:")[:12] / path
        file.write_bytes(change(file.read_bytes()))

    return Target(str(share), alter)


def make_memory(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    system = fsspec.filesystem("memory")
    root = f"/{tmp_path.name}"
    request.addfinalizer(lambda: system.exists(root) and system.rm(root, recursive=True))

    def alter(done: Published, path: str, change: Callable[[bytes], bytes]) -> None:
        file = f"{root}/tiny/q8_0/{done.digest.removeprefix('sha256:')[:12]}/{path}"
        system.pipe_file(file, change(system.cat_file(file)))

    return Target(f"memory:/{root}", alter)


def make_registry(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    registry: Registry = request.getfixturevalue("registry")
    text = f"oci://127.0.0.1:{registry.port}/{re.sub('[^a-z0-9]+', '', tmp_path.name.lower())}"

    def alter(done: Published, path: str, change: Callable[[bytes], bytes]) -> None:
        digest = done.digest
        if path != MANIFEST_NAME:
            document = json.loads(registry.blob_file(done.digest).read_bytes())
            digest = next(
                layer["digest"]
                for layer in document["layers"]
                if layer["annotations"]["org.cncf.model.filepath"] == path
            )
        file = registry.blob_file(digest)
        before = file.read_bytes()
        request.addfinalizer(lambda: file.write_bytes(before))  # other tests share its blobs
        file.write_bytes(change(before))

    return Target(text, alter)


def make_hub(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    hub: Hub = request.getfixturevalue("hub")

    def alter(done: Published, path: str, change: Callable[[bytes], bytes]) -> None:
        repository = hub.repositories["team/tiny-q8_0"]
        content, large = repository.commits[repository.head][path]
        altered = change(content)
        repository.commits[repository.head][path] = (altered, large)
        hub.large[hashlib.sha256(altered).hexdigest()] = altered

    return Target("hf://team", alter)


def make_own(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    """A kind of place that is not this program's: a module, and a line in KINDS."""
    monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    line = places.PlaceKind(("drawer",), "drawer://NAME", "tests.publish.drawer:DrawerPlace")
    monkeypatch.setattr(places, "KINDS", (*places.KINDS, line))
    monkeypatch.setattr(drawer, "DRAWERS", {})

    def alter(done: Published, path: str, change: Callable[[bytes], bytes]) -> None:
        kept = drawer.DRAWERS[done.name].files
        kept[done.digest, path] = change(kept[done.digest, path])

    return Target(f"drawer://{tmp_path.name}", alter)


MAKERS = {"folder": make_folder, "memory": make_memory, "registry": make_registry, "hub": make_hub, "own": make_own}


@pytest.fixture(params=MAKERS)
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    return MAKERS[request.param](request, tmp_path)


def files_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in sorted(folder.iterdir()) if path.is_file())
    return {path.name: path.read_bytes() for path in found}


def test_what_is_published_can_be_pulled(target: Target, artifact: Artifact, session: Session, store: Store) -> None:
    done = publish_one(artifact, target.text, session)
    assert done.sent_bytes == done.size_bytes
    assert done.digest in done.reference
    pulled = pull(done.reference, store, session)
    assert pulled.artifact.manifest == artifact.manifest
    assert pulled.reference == done.reference
    assert files_of(pulled.artifact.folder) == files_of(artifact.folder)
    assert store.find("tiny/q8_0").folder == pulled.artifact.folder
    assert pull(done.reference, store, session).fetched_bytes == 0
    assert not (store.root / ".staging").exists()


def test_a_name_without_a_digest_says_what_it_means(
    target: Target, artifact: Artifact, session: Session, reporter: ListReporter, store: Store
) -> None:
    done = publish_one(artifact, target.text, session)
    pulled = pull(done.name, store, session)
    assert pulled.reference == done.reference
    assert any(done.digest in event.text for event in reporter.events if event.kind is EventKind.NOTE)


def test_a_second_publication_sends_nothing(target: Target, artifact: Artifact, session: Session) -> None:
    first = publish_one(artifact, target.text, session)
    second = publish_one(artifact, target.text, session)
    assert (second.sent_bytes, second.sent_files) == (0, 0)
    assert second.reference == first.reference


def test_a_name_moves_only_when_told(target: Target, artifact: Artifact, session: Session, store: Store) -> None:
    first = publish_one(artifact, target.text, session)
    (artifact.folder / "evaluation.md").write_text("measured anew\n")
    with pytest.raises(RefusedError, match="already means sha256:") as caught:
        publish_one(artifact, target.text, session)
    assert "--move-tag" in str(caught.value.hint)
    second = publish_one(artifact, target.text, session, move_tag=True)
    assert (second.moved_from, second.name) == (first.digest, first.name)
    if target.text.startswith(("oci", "hf")):
        assert second.sent_bytes < 20_000, "the weights were there"
    assert pull(second.name, store, session).digest == second.digest
    assert pull(first.reference, store, session).digest == first.digest


def test_an_altered_file_is_refused(target: Target, artifact: Artifact, session: Session, store: Store) -> None:
    done = publish_one(artifact, target.text, session)
    weights = artifact.manifest.files[-1].path
    target.alter(done, weights, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(VerifyError, match=f"{weights} was altered: its sha256 is not the one in the manifest"):
        pull(done.reference, store, session)
    assert store.artifacts() == []


def test_an_altered_paper_is_refused(target: Target, artifact: Artifact, session: Session, store: Store) -> None:
    done = publish_one(artifact, target.text, session)
    target.alter(done, "README.md", lambda data: data.replace(b"tiny", b"tony"))
    with pytest.raises(VerifyError, match=r"README\.md was altered"):
        pull(done.reference, store, session)
    assert store.artifacts() == []


def test_a_swapped_manifest_is_refused(target: Target, artifact: Artifact, session: Session, store: Store) -> None:
    done = publish_one(artifact, target.text, session)
    target.alter(done, MANIFEST_NAME, lambda data: data.replace(b"README.md", b"README.MD"))
    with pytest.raises((VerifyError, Exception)) as caught:
        pull(done.reference, store, session)
    assert re.search("another manifest came|status 5|no such manifest", str(caught.value))
    assert store.artifacts() == []


def test_nothing_is_there(target: Target, artifact: Artifact, session: Session, store: Store) -> None:
    reference = {"hf": "hf://team/none", "oc": f"{target.text}/none:x"}.get(target.text[:2], f"{target.text}/none/x")
    with pytest.raises(VerifyError, match="nothing is published there"):
        pull(reference, store, session)
    with pytest.raises(VerifyError, match=r"there is no such|no modelpack\.json there"):
        pull(f"{reference.removesuffix(':x')}@sha256:{'0' * 64}", store, session)


def test_several_artifacts_each_have_a_place(target: Target, shelf: Store, session: Session, store: Store) -> None:
    found = [Wanted(shelf.find(f"tiny/{name}"), POLICY) for name in ("q8_0", "q4_0")]
    done = list(publish(found, target.text, shelf.root, session))
    assert len({item.name for item in done}) == 2
    for item in done:
        assert pull(item.reference, store, session).artifact.ref == item.artifact.ref


def test_a_share_keeps_weights_once(artifact: Artifact, session: Session, tmp_path: Path) -> None:
    publish_one(artifact, str(tmp_path / "share"), session)
    (artifact.folder / "evaluation.md").write_text("measured anew\n")
    publish_one(artifact, str(tmp_path / "share"), session, move_tag=True)
    first, second = sorted((tmp_path / "share/tiny/q8_0").glob("*/*.gguf"))
    assert first.samefile(second)
    first.unlink()
    first.write_bytes(b"another file of that name")
    assert second.stat().st_size == 200_000


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a file system in which no folder can be made")
def test_a_folder_that_can_not_be_made(artifact: Artifact, session: Session) -> None:
    with pytest.raises(TransferError, match=r"/proc/nowhere.*can't be made") as caught:
        publish_one(artifact, "/proc/nowhere", session)
    assert "that can be written" in str(caught.value.hint)


def test_two_artifacts_for_one_place(shelf: Store, session: Session, registry: Registry) -> None:
    found = [Wanted(shelf.find(f"tiny/{name}"), POLICY) for name in ("q8_0", "q4_0")]
    target = f"oci://127.0.0.1:{registry.port}/one:tag"
    with pytest.raises(UsageError, match="would both be"):
        list(publish(found, target, shelf.root, session))


def test_a_new_kind_is_named_where_the_others_are(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    make_own(request, tmp_path)
    assert places.forms().endswith("hf://ORG[/NAME], drawer://NAME, or a URL that fsspec knows")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("oci://127.0.0.1:5000/Upper", "is not a place in a registry"),
        ("oci://127.0.0.1:5000/a@sha256:abc", "is not a place in a registry"),
        ("hf://a/b/c", "is not a place on the hub"),
        ("nonsense://bucket/path", "can't be opened: Protocol not known"),
        (f"/share@sha256:{'0' * 64}", "a target has no digest"),
    ],
)
def test_what_is_no_target(text: str, message: str, artifact: Artifact, session: Session) -> None:
    with pytest.raises(UsageError, match=message):
        publish_one(artifact, text, session)


def test_the_hub_repository_is_private_and_loses_what_is_stale(
    hub: Hub, artifact: Artifact, session: Session, store: Store
) -> None:
    (artifact.folder / "evaluation.md").write_text("to go\n")
    publish_one(artifact, "hf://team/model", session)
    repository = hub.repositories["team/model"]
    assert repository.private
    (artifact.folder / "evaluation.md").unlink()
    start = len(hub.requests)
    done = publish_one(artifact, "hf://team/model", session, move_tag=True)
    assert hub.sent(start) == [], "the weights were there"
    assert "evaluation.md" not in repository.commits[repository.head]
    assert ".gitattributes" in repository.commits[repository.head]
    assert done.reference == f"hf://team/model@{repository.head}@{done.digest}"
    assert len(repository.commits) == 3


def test_a_hub_repository_with_other_files_is_not_overwritten(hub: Hub, artifact: Artifact, session: Session) -> None:
    publish_one(artifact, "hf://team/model", session)
    repository = hub.repositories["team/model"]
    repository.add({"pytorch_model.bin": (b"x" * 20, False)})
    with pytest.raises(RefusedError, match=r"already means commit [0-9a-f]{40}"):
        publish_one(artifact, "hf://team/model", session)


def test_the_hub_fails_now_and_then(hub: Hub, artifact: Artifact, session: Session, store: Store) -> None:
    wanting = ["/revision/", "/preupload/", "/commit/", "/revision/"]

    def fail(_method: str, path: str) -> int | None:
        if wanting and wanting[0] in path:
            wanting.pop(0)
            return 503
        return None

    hub.fail = fail
    done = publish_one(artifact, "hf://team/model", session)
    assert pull(done.reference, store, session).artifact.manifest == artifact.manifest
