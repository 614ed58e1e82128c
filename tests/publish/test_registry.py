"""The registry's protocol under bad conditions: requests that fail, servers that go away, and those that lie."""

from __future__ import annotations

import base64
import itertools
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import quantize.publish.registry as module
from quantize.errors import RefusedError, TransferError, VerifyError
from quantize.events import ListReporter
from quantize.publish.pack import publishable_files
from quantize.publish.receive import pull
from quantize.publish.retry import Retry
from quantize.publish.transfer import Session
from quantize.store.artifact import Artifact
from quantize.store.store import Store
from tests.publish.conftest import QUICK, Registry, publish_one
from tests.publish.proxy import Answer, Asked, Forward, Proxy, proxy_before

REPOSITORIES = itertools.count()


@pytest.fixture
def target(proxy: Proxy) -> str:
    """A repository of the test's own, by way of the proxy."""
    return f"oci://{proxy.host}/team{next(REPOSITORIES)}"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blobs go in pieces of 32 KiB, so that the tiny weights are several."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 32 << 10)


def every_fifth(what: Callable[[Forward], Answer | None]) -> Callable[[Asked, Forward], Answer | None]:
    return lambda asked, forward: what(forward) if asked.number % 5 == 0 else forward()


def lose_the_answer(forward: Forward) -> None:
    forward()


def cut_the_answer(forward: Forward) -> Answer:
    answer = forward()
    return replace(answer, short=len(answer.body) // 2) if len(answer.body) > 1000 else answer


@pytest.mark.parametrize(
    "what",
    [
        lambda _: Answer(503),
        lambda _: Answer(429, (("Retry-After", "0"),)),
        lambda _: None,
        lose_the_answer,
        cut_the_answer,
    ],
    ids=["status 503", "status 429", "dropped", "answer lost", "answer cut off"],
)
@pytest.mark.usefixtures("small_pieces")
def test_one_request_in_five_fails(
    what: Callable[[Forward], Answer | None],
    proxy: Proxy,
    target: str,
    artifact: Artifact,
    session: Session,
    store: Store,
    registry: Registry,
) -> None:
    proxy.rule = every_fifth(what)
    done = publish_one(artifact, target, session)
    assert pull(done.reference, store, session).artifact.manifest == artifact.manifest
    repository = target.rpartition("/")[2] + "/tiny"
    assert registry.tags(repository) == ["q8_0", f"q8_0-{done.digest.removeprefix('sha256:')[:12]}"]
    assert any(asked.method == "PATCH" for asked in proxy.asked)


@pytest.mark.usefixtures("small_pieces")
def test_a_registry_that_goes_away_for_a_while(
    tmp_path: Path, artifact: Artifact, store: Store, monkeypatch: pytest.MonkeyPatch, registry: Registry
) -> None:
    """It loses its uploads as it goes, so that a blob starts over; what is complete stays."""
    (tmp_path / "own").mkdir()
    own = Registry(tmp_path / "own")
    own.start()

    def restart() -> None:
        own.stop()
        time.sleep(1.5)
        own.start()

    with proxy_before(own.port) as proxy:
        outage = threading.Thread(target=restart)

        def rule(asked: Asked, forward: Forward) -> Answer | None:
            if asked.method == "PATCH" and not outage.ident:
                outage.start()
            return forward()

        proxy.rule = rule
        session = Session(ListReporter(), jobs=3, retry=Retry(first_seconds=0.25))
        try:
            done = publish_one(artifact, f"oci://{proxy.host}/team", session)
            assert outage.ident
            pulled = pull(done.reference, store, session)
            assert pulled.artifact.manifest == artifact.manifest
        finally:
            outage.join()
            own.stop()


@pytest.mark.usefixtures("small_pieces")
def test_a_registry_that_stays_away(proxy: Proxy, target: str, artifact: Artifact, registry: Registry) -> None:
    gone = threading.Event()

    def rule(asked: Asked, forward: Forward) -> Answer | None:
        if asked.method == "PATCH":
            gone.set()
        return None if gone.is_set() else forward()

    proxy.rule = rule
    session = Session(ListReporter(), jobs=1, retry=replace(QUICK, tries=3))
    with pytest.raises(TransferError, match=r"given up after 3 tries in \d+ s: \w+") as caught:
        publish_one(artifact, target, session)
    assert "run the same command again" in str(caught.value.hint)
    proxy.rule = lambda _, forward: forward()
    before = len(proxy.asked)
    publish_one(artifact, target, session)
    again = [asked.path for asked in proxy.since(before) if asked.sends_blob]
    assert again, "what had not arrived"


@pytest.mark.usefixtures("small_pieces")
def test_it_goes_on_at_the_piece_that_failed(proxy: Proxy, target: str, artifact: Artifact, session: Session) -> None:
    broken = iter([False, True])
    proxy.rule = lambda asked, forward: Answer(503) if asked.method == "PATCH" and next(broken, False) else forward()
    publish_one(artifact, target, session)
    pieces = [asked.headers["Content-Range"] for asked in proxy.asked if asked.method == "PATCH"]
    assert pieces[:3] == ["0-32767", "32768-65535", "32768-65535"]
    assert pieces.count("0-32767") == 1


@pytest.mark.usefixtures("small_pieces")
def test_a_registry_that_takes_no_pieces(proxy: Proxy, target: str, artifact: Artifact, session: Session) -> None:
    proxy.rule = lambda asked, forward: Answer(405) if asked.method == "PATCH" else forward()
    done = publish_one(artifact, target, session)
    largest = max(entry.size_bytes for entry in artifact.manifest.files)
    assert [asked.size for asked in proxy.asked if asked.method == "PUT" and asked.size == largest] == [largest]
    assert done.sent_files == len(publishable_files(artifact)) + 1


def test_a_second_publication_sends_no_blob(proxy: Proxy, target: str, artifact: Artifact, session: Session) -> None:
    publish_one(artifact, target, session)
    first = len(proxy.asked)
    assert sum(asked.sends for asked in proxy.asked) > 0
    publish_one(artifact, target, session)
    assert [asked for asked in proxy.since(first) if asked.method not in ("GET", "HEAD")] == []


def test_the_manifest_comes_last_and_the_tag_after_it(
    proxy: Proxy, target: str, artifact: Artifact, session: Session
) -> None:
    done = publish_one(artifact, target, session)
    puts = [asked.path.rpartition("/")[2] for asked in proxy.asked if asked.method == "PUT"]
    assert puts[-3:] == [done.digest, f"q8_0-{done.digest[7:19]}", "q8_0"]
    assert not any("manifests" in asked.path for asked in proxy.asked if asked.method == "PUT" and asked.number < 5)


def test_an_upload_that_fails_leaves_no_tag(proxy: Proxy, target: str, artifact: Artifact, registry: Registry) -> None:
    weights = f"sha256:{artifact.manifest.files[-1].sha256}"
    proxy.rule = lambda asked, forward: Answer(503) if weights in asked.path and asked.sends else forward()
    with pytest.raises(TransferError, match="status 503"):
        publish_one(artifact, target, Session(ListReporter(), jobs=3, retry=replace(QUICK, tries=2)))
    assert not any("manifests" in asked.path for asked in proxy.asked if asked.method == "PUT")


def test_a_pull_goes_on_where_it_broke_off(
    proxy: Proxy, target: str, artifact: Artifact, session: Session, store: Store
) -> None:
    done = publish_one(artifact, target, session)
    weights = artifact.manifest.files[-1]
    broken = threading.Event()

    def rule(asked: Asked, forward: Forward) -> Answer | None:
        if weights.sha256 not in asked.path:
            return forward()
        if broken.is_set():
            return None
        broken.set()
        return replace(forward(), short=weights.size_bytes // 3)

    proxy.rule = rule
    once = Session(ListReporter(), jobs=1, retry=replace(QUICK, tries=2))
    with pytest.raises(TransferError, match="run the same command again"):
        pull(done.reference, store, once)
    assert store.artifacts() == []
    (left,) = (store.root / ".staging").glob("*/*.gguf")
    assert 0 < left.stat().st_size < weights.size_bytes
    proxy.rule = lambda _, forward: forward()
    before = len(proxy.asked)
    pulled = pull(done.reference, store, session)
    ranges = [asked.headers.get("Range") for asked in proxy.since(before) if weights.sha256 in asked.path]
    assert ranges == [f"bytes={weights.size_bytes - weights.size_bytes // 3}-"]
    assert pulled.fetched_bytes < done.size_bytes - weights.size_bytes // 3
    assert not (store.root / ".staging").exists()


def test_a_beginning_that_is_none_is_fetched_anew(
    proxy: Proxy, target: str, artifact: Artifact, session: Session, store: Store
) -> None:
    done = publish_one(artifact, target, session)
    left = store.root / ".staging" / f"tiny--q8_0.pull-{done.digest[7:19]}"
    left.mkdir(parents=True)
    (left / artifact.manifest.files[-1].path).write_bytes(b"not how it begins")
    (left / "stranger").write_bytes(b"x")
    assert pull(done.reference, store, session).artifact.manifest == artifact.manifest
    assert not (store.find("tiny/q8_0").folder / "stranger").exists()


def alter_manifest(change: Callable[[bytes], bytes]) -> Callable[[Asked, Forward], Answer | None]:
    def rule(asked: Asked, forward: Forward) -> Answer:
        answer = forward()
        return replace(answer, body=change(answer.body)) if "/manifests/" in asked.path else answer

    return rule


def test_another_manifest_than_was_asked_for(
    proxy: Proxy, target: str, artifact: Artifact, session: Session, store: Store
) -> None:
    done = publish_one(artifact, target, session)
    proxy.rule = alter_manifest(lambda body: body.replace(b"README.md", b"README.MD"))
    with pytest.raises(VerifyError, match="another manifest came than the one with that digest"):
        pull(done.reference, store, session)
    assert not store.root.exists()


def test_a_tag_that_was_moved(proxy: Proxy, target: str, artifact: Artifact, session: Session, store: Store) -> None:
    first = publish_one(artifact, target, session)
    (artifact.folder / "evaluation.md").write_text("another publication\n")
    second = publish_one(artifact, target, session, move_tag=True)
    with pytest.raises(VerifyError, match=f"was moved: it means {second.digest} now"):
        pull(f"{first.name}@{first.digest}", store, session)
    assert not store.root.exists()
    assert pull(first.reference, store, session).digest == first.digest


def test_a_tag_that_moves_while_it_is_published(
    proxy: Proxy, target: str, artifact: Artifact, session: Session, registry: Registry
) -> None:
    done = publish_one(artifact, target, session)
    (artifact.folder / "evaluation.md").write_text("mine\n")
    repository = f"{target.rpartition('/')[2]}/tiny"
    asks = itertools.count()
    other = json.dumps({"schemaVersion": 2}).encode()
    proxy.rule = lambda asked, forward: (
        Answer(200, (), other)
        if asked.method == "GET" and asked.path.endswith("/manifests/q8_0") and next(asks)
        else forward()
    )
    with pytest.raises(RefusedError, match="was moved by someone else meanwhile"):
        publish_one(artifact, target, session, move_tag=True)
    assert registry.tags(repository) == ["q8_0", f"q8_0-{done.digest[7:19]}"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body[: len(body) // 2], r"is cut off: the registry has [\d,]+ of [\d,]+ bytes"),
        (lambda body: body + b"x", "more comes than the"),
        (lambda body: bytes([body[0] ^ 1]) + body[1:], "was altered"),
    ],
    ids=["truncated", "longer", "altered"],
)
def test_another_blob_than_was_asked_for(
    change: Callable[[bytes], bytes],
    message: str,
    proxy: Proxy,
    target: str,
    artifact: Artifact,
    session: Session,
    store: Store,
) -> None:
    done = publish_one(artifact, target, session)
    weights = artifact.manifest.files[-1].sha256

    def rule(asked: Asked, forward: Forward) -> Answer:
        answer = forward()
        return replace(answer, body=change(answer.body)) if weights in asked.path else answer

    proxy.rule = rule
    with pytest.raises(VerifyError, match=message):
        pull(done.reference, store, session)
    assert store.artifacts() == []


def test_a_login_is_used_and_goes_nowhere_else(
    tmp_path: Path, artifact: Artifact, session: Session, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registry with passwords, behind a proxy that sends blobs to another origin."""
    (tmp_path / "own").mkdir()
    # bcrypt of "open sesame", as htpasswd -nbB makes it
    (tmp_path / "own/htpasswd").write_text("ali:$2b$05$abcdefghijklmnopqrstuupx2xBUC4954936wVIjyyPHmUBFu0wCW\n")
    own = Registry(tmp_path / "own", f"auth: {{htpasswd: {{realm: r, path: {tmp_path / 'own/htpasswd'}}}}}\n")
    own.start()
    try:
        with proxy_before(own.port) as proxy, proxy_before(own.port) as elsewhere:
            target = f"oci://{proxy.host}/team"
            with pytest.raises(TransferError, match="asks for a login") as caught:
                publish_one(artifact, target, session)
            assert f"docker login {proxy.host}" in str(caught.value.hint)
            log_in(tmp_path, monkeypatch, proxy.host, "ali:wrong")
            with pytest.raises(TransferError, match="does not accept the login") as caught:
                publish_one(artifact, target, session)
            assert "wrong" not in str(caught.value)
            log_in(tmp_path, monkeypatch, proxy.host, "ali:open sesame")
            done = publish_one(artifact, target, session)
            secret = base64.b64encode(b"ali:open sesame").decode()
            allow = {"Authorization": f"Basic {secret}"}

            def rule(asked: Asked, forward: Forward) -> Answer:
                if asked.method == "GET" and "/blobs/" in asked.path:
                    return Answer(307, (("Location", f"http://{elsewhere.host}{asked.path}"),))
                return forward()

            proxy.rule = rule
            elsewhere.rule = lambda asked, _: _with_login(own, asked, allow)
            pulled = pull(done.reference, store, session)
            assert pulled.artifact.manifest == artifact.manifest
            assert elsewhere.asked
            assert not any("Authorization" in asked.headers for asked in elsewhere.asked)
            assert any("Authorization" in asked.headers for asked in proxy.asked)
    finally:
        own.stop()


def _with_login(own: Registry, asked: Asked, headers: dict[str, str]) -> Answer:
    import urllib.request

    request = urllib.request.Request(f"http://127.0.0.1:{own.port}{asked.path}", headers=headers)
    with urllib.request.urlopen(request) as answer:
        return Answer(200, (), answer.read())


def log_in(folder: Path, monkeypatch: pytest.MonkeyPatch, host: str, text: str) -> None:
    """What docker login leaves."""
    (folder / "docker").mkdir(exist_ok=True)
    auths = {host: {"auth": base64.b64encode(text.encode()).decode()}}
    (folder / "docker/config.json").write_text(json.dumps({"auths": auths}))
    monkeypatch.setenv("DOCKER_CONFIG", str(folder / "docker"))


def test_oras_alone_gets_the_files(
    registry: Registry, artifact: Artifact, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An independent reader, in the place of its command, which is in no package here."""
    oras = pytest.importorskip("oras.client")
    monkeypatch.setenv("HOME", str(tmp_path))
    done = publish_one(artifact, f"oci://127.0.0.1:{registry.port}/oras", session)
    client = oras.OrasClient(insecure=True)
    paths = client.pull(target=done.reference.removeprefix("oci://"), outdir=str(tmp_path / "out"))
    assert {Path(path).name: Path(path).read_bytes() for path in paths} == {
        path.name: path.read_bytes() for path in artifact.folder.iterdir()
    }


def test_another_modelpack_client_gets_the_model(
    registry: Registry, artifact: Artifact, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the configuration against the published schema, and every digest and size against the manifest."""
    modelpack = pytest.importorskip("modelpack_client")
    monkeypatch.setenv("HOME", str(tmp_path))
    done = publish_one(artifact, f"oci://127.0.0.1:{registry.port}/modelpack", session)
    client = modelpack.ModelPackClient(insecure=True)
    client.pull(done.reference.removeprefix("oci://"), tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in artifact.folder.iterdir()
    }
