"""Two at once, too little room, a newer build at home: what a publication and a pull do when they are not alone."""

from __future__ import annotations

import heapq
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import quantize.publish.claims as claims_module
import quantize.publish.send as send_module
from quantize.errors import QuantizeError, RefusedError, VerifyError
from quantize.events import ListReporter
from quantize.publish.claims import Turn, may_move
from quantize.publish.folder import FolderPlace
from quantize.publish.pack import Blob, Pack
from quantize.publish.receive import pull
from quantize.publish.send import Published
from quantize.publish.transfer import Session
from quantize.store.artifact import REFUSED, Artifact, commit, set_aside, write_measurements
from quantize.store.manifest import AcceptedRisk
from quantize.store.store import Store
from tests.conftest import Run
from tests.publish.conftest import QUICK, Registry, place, publish_one
from tests.publish.proxy import Answer, Asked, Forward, Proxy
from tests.publish.test_targets import Target, hub, target

__all__ = ["hub", "target"]  # fixtures

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(autouse=True)
def _settles_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "SETTLE_SECONDS", 1.5)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> threading.Barrier:
    """Has two publishers both look at the target before either of them writes."""
    barrier, absent = threading.Barrier(2, timeout=60), send_module._absent

    def wait(place: object, pack: Pack, session: Session) -> list[Blob]:
        found = absent(place, pack, session)  # type: ignore[arg-type]
        barrier.wait()
        return found

    monkeypatch.setattr(send_module, "_absent", wait)
    return barrier


def publisher(root: Path, words: str) -> Artifact:
    """The same artifact in a store of its own; its figures are in other words, so its publication is another."""
    artifact = place(root, "q8_0", 0)
    (artifact.folder / "evaluation.md").write_text(words)
    return artifact


def at_once(calls: list[Callable[[], Published]]) -> list[Published | QuantizeError]:
    def caught(call: Callable[[], Published]) -> Published | QuantizeError:
        try:
            return call()
        except QuantizeError as exc:
            return exc

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(caught, calls))


def publishing(artifact: Artifact, to: str, *, move_tag: bool = False) -> Callable[[], Published]:
    return lambda: publish_one(artifact, to, Session(ListReporter(), jobs=2, retry=QUICK), move_tag=move_tag)


# --- two publishers ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("together")
def test_the_same_artifact_twice_at_once_is_fine_twice(target: Target, tmp_path: Path, store: Store) -> None:
    artifacts = [publisher(tmp_path / name, "the same") for name in ("one", "two")]
    first, second = at_once([publishing(item, target.text) for item in artifacts])
    assert isinstance(first, Published), first
    assert isinstance(second, Published), second
    assert (first.digest, first.reference) == (second.digest, second.reference)
    assert pull(first.name, store, Session(ListReporter(), retry=QUICK)).digest == first.digest


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("moving", [False, True], ids=["first", "move"])
def test_of_two_publishers_of_a_tag_one_is_refused(
    moving: bool, target: Target, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    if moving:
        with monkeypatch.context() as alone:
            alone.setattr(send_module, "_absent", send_module._absent.__closure__[0].cell_contents)  # type: ignore[attr-defined]
            publishing(publisher(tmp_path / "zero", "before"), target.text)()
    artifacts = [publisher(tmp_path / name, name) for name in ("one", "two")]
    results = at_once([publishing(item, target.text, move_tag=moving) for item in artifacts])
    done = [item for item in results if isinstance(item, Published)]
    refused = [item for item in results if isinstance(item, RefusedError)]
    assert (len(done), len(refused)) == (1, 1), results
    assert re.search("was moved by someone else meanwhile|goes first", refused[0].message)
    assert pull(done[0].name, store, Session(ListReporter(), retry=QUICK)).digest == done[0].digest


def test_a_publisher_whose_last_write_is_late(proxy: Proxy, registry: Registry, tmp_path: Path, store: Store) -> None:
    """It holds its claim: who comes meanwhile waits, and is refused when the tag has come."""
    to = f"oci://{proxy.host}/{re.sub('[^a-z0-9]+', '', tmp_path.name.lower())}"
    late, first, second = threading.Event(), publisher(tmp_path / "one", "1"), publisher(tmp_path / "two", "2")

    def delay(asked: Asked, forward: Forward) -> Answer:
        if asked.method == "PUT" and asked.path.endswith("/manifests/q8_0") and not late.is_set():
            late.set()
            time.sleep(0.8)
        return forward()

    proxy.rule = delay

    def come_later() -> Published:
        assert late.wait(60)
        return publishing(second, to)()

    one, two = at_once([publishing(first, to), come_later])
    assert isinstance(one, Published), one
    assert isinstance(two, RefusedError), two
    assert pull(one.name, store, Session(ListReporter(), retry=QUICK)).digest == one.digest


def test_a_claim_of_somebody_who_was_killed_only_costs_time(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = f"oci://{proxy.host}/{re.sub('[^a-z0-9]+', '', tmp_path.name.lower())}"
    proxy.rule = lambda asked, forward: (
        Answer(403) if asked.method == "PUT" and asked.path.endswith("/manifests/q8_0") else forward()
    )
    (lost,) = at_once([publishing(publisher(tmp_path / "one", "1"), to)])
    assert isinstance(lost, QuantizeError)
    proxy.rule = lambda _, forward: forward()
    monkeypatch.setattr(claims_module, "SETTLE_SECONDS", 0.1)
    done = publishing(publisher(tmp_path / "two", "2"), to)()
    assert done.moved_from is None


@dataclass
class Simulated:
    """A registry's tags, in a time of its own: each request takes effect at one moment of it."""

    tag: str | None = None
    tags: set[str] = field(default_factory=set)
    now: float = 0.0
    waiting: list[tuple[float, int, threading.Event]] = field(default_factory=list)
    turn: threading.Lock = field(default_factory=threading.Lock)
    running: int = 0
    count: Iterator[int] = field(default_factory=itertools.count)

    def sleep(self, seconds: float) -> None:
        """Wait in its time; the last one to wait wakes whoever is next."""
        mine = threading.Event()
        with self.turn:
            heapq.heappush(self.waiting, (self.now + seconds, next(self.count), mine))
            self.running -= 1
            self._wake()
        assert mine.wait(30)

    def end(self) -> None:
        with self.turn:
            self.running -= 1
            self._wake()

    def _wake(self) -> None:
        if self.running == 0 and self.waiting:
            self.now, _, event = heapq.heappop(self.waiting)
            self.running += 1
            event.set()


@given(st.lists(st.floats(0, 3), min_size=24, max_size=24), st.integers(2, 3), st.permutations(["a", "b", "c"]))
@settings(max_examples=60, deadline=None)
def test_however_requests_fall_no_two_publishers_both_move_a_tag(
    delays: list[float], count: int, names: list[str]
) -> None:
    """A model of it: each request takes effect after some time and is answered after some more, in all less than
    SETTLE_SECONDS / 4.
    """
    world, results = Simulated(running=count), dict[str, bool | None]()
    latest = claims_module.SETTLE_SECONDS / 4

    def publish(number: int) -> None:
        name, own = names[number], iter(delays[number * 8 : number * 8 + 8] * 20)

        def request(effect: Callable[[], Any]) -> Any:
            world.sleep(next(own) / 6 * latest)
            answer = effect()
            world.sleep(next(own) / 6 * latest)
            return answer

        def meant() -> str | None:
            found: str | None = request(lambda: world.tag)
            return found

        def claims() -> set[str]:
            found: set[str] = request(lambda: set(world.tags))
            return found

        def put() -> None:
            world.tag = name

        world.sleep(next(own) * claims_module.SETTLE_SECONDS / 3)
        seen, before = claims(), meant()
        if before is not None:
            results[name] = None
        else:
            request(lambda: world.tags.add(name))
            try:
                if may_move(Turn("tag", name, seen, name, before), claims, meant, world.sleep):
                    request(put)
                    results[name] = True
            except RefusedError:
                results[name] = False
        world.end()

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == count
    assert [*results.values()].count(True) <= 1
    assert world.tag is None or results[world.tag]


# --- too little room --------------------------------------------------------------------------------------------------


def test_a_folder_too_small_is_refused_before_anything_is_written(
    artifact: Artifact, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FolderPlace, "free_bytes", lambda _: 150_000)
    with pytest.raises(RefusedError, match=r"are to be sent, 150\.0 kB are free, [\d,]+ bytes are missing") as caught:
        publish_one(artifact, str(tmp_path / "share"), session)
    assert "nothing was written" in str(caught.value.hint)
    assert not (tmp_path / "share").exists()
    monkeypatch.setattr(FolderPlace, "free_bytes", lambda _: 400_000)
    publish_one(artifact, str(tmp_path / "share"), session)
    (artifact.folder / "evaluation.md").write_text("measured anew\n")
    monkeypatch.setattr(FolderPlace, "free_bytes", lambda _: 150_000)
    publish_one(artifact, str(tmp_path / "share"), session, move_tag=True)  # the weights are linked


# --- what there is ----------------------------------------------------------------------------------------------------


def test_a_registry_without_a_tag_lists_what_is_there(
    registry: Registry, shelf: Store, session: Session, tmp_path: Path, store: Store
) -> None:
    to = f"oci://127.0.0.1:{registry.port}/{re.sub('[^a-z0-9]+', '', tmp_path.name.lower())}"
    for variant in ("q8_0", "q4_0"):
        publish_one(shelf.find(f"tiny/{variant}"), to, session)
    (shelf.find("tiny/q8_0").folder / "evaluation.md").write_text("anew")
    publish_one(shelf.find("tiny/q8_0"), to, session, move_tag=True)
    with pytest.raises(VerifyError, match=r":latest: nothing is published there") as caught:
        pull(f"{to}/tiny", store, session)
    assert caught.value.hint == f"there are: {to}/tiny:q4_0, {to}/tiny:q8_0"


@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_a_share_lists_what_is_there_and_takes_the_folder_of_one_publication(
    scheme: str, shelf: Store, session: Session, tmp_path: Path, store: Store
) -> None:
    share = f"{scheme}{tmp_path}/share"
    done = [publish_one(shelf.find(f"tiny/{variant}"), share, session) for variant in ("q8_0", "q4_0")]
    for above in (share, f"{share}/tiny"):
        with pytest.raises(VerifyError, match="nothing is published there") as caught:
            pull(above, store, session)
        assert caught.value.hint == f"there are: {share}/tiny/q4_0, {share}/tiny/q8_0"
    folder = f"{share}/tiny/q8_0/{done[0].digest.removeprefix('sha256:')[:12]}"
    pulled = pull(folder, store, session)
    assert (pulled.digest, pulled.reference) == (done[0].digest, done[0].reference)
    with pytest.raises(VerifyError, match="nothing is published there"):
        pull(f"{share}/tiny/q8_0/{'0' * 12}", store, session)


# --- a newer build at home --------------------------------------------------------------------------------------------


def build_at(store: Store, seed: int, built_at: str) -> Artifact:
    """A build of tiny/q8_0, as if made here then."""
    artifact = place(store.root, "q8_0", seed)
    write_measurements(artifact.folder, {"built_at": built_at})
    return commit(store.root, artifact.folder, artifact.manifest)


def test_a_pull_over_a_newer_build_of_ones_own_needs_replace(
    artifact: Artifact, session: Session, reporter: ListReporter, tmp_path: Path, run: Run, store: Store
) -> None:
    done = publish_one(artifact, str(tmp_path / "share"), session)
    older = build_at(store, 7, "2025-01-01T00:00:00+00:00")
    newer = build_at(store, 8, "2026-06-01T10:20:00+00:00")
    with pytest.raises(RefusedError) as caught:
        pull(done.reference, store, session)
    assert caught.value.message == (
        f"{newer.ref} is the current build: it was built here 2026-06-01 10:20, what is to be pulled 2026-01-01 00:00"
    )
    assert "--replace" in str(caught.value.hint)
    assert store.find("tiny/q8_0").folder == newer.folder
    pulled = run("--", "pull", done.reference, "--replace", "--store", store.root)
    assert pulled.exit_code == 0, pulled.stderr
    assert store.find("tiny/q8_0").manifest == artifact.manifest
    shown = run("list", "artifacts", "--all", "--store", store.root).stdout
    (line,) = [text for text in shown.splitlines() if text.rstrip().endswith("yes")]
    assert artifact.manifest.short_digest in line
    current = {item["digest"]: item["current"] for item in
               json.loads(run("list", "artifacts", "--all", "--json", "--store", store.root).stdout)}  # fmt: skip
    assert current == {artifact.manifest.digest: True, older.manifest.digest: False, newer.manifest.digest: False}
    swept = run("gc", "--delete", "--store", store.root)
    assert not older.folder.exists()
    assert newer.folder.exists()
    assert f"kept: {newer.folder}: built here, and newer than the pulled one that is current" in swept.stdout
    run("gc", "--delete", "--newer", "--store", store.root)
    assert not newer.folder.exists()


def test_a_pull_of_what_is_newer_or_was_pulled_itself_goes_on(
    artifact: Artifact, session: Session, reporter: ListReporter, tmp_path: Path, store: Store
) -> None:
    done = publish_one(artifact, str(tmp_path / "share"), session)
    build_at(store, 7, "2025-01-01T00:00:00+00:00")
    pulled = pull(done.reference, store, session)
    assert store.is_current(pulled.artifact)
    assert pulled.artifact.is_pulled
    other = place(tmp_path / "elsewhere", "q8_0", 3)
    write_measurements(other.folder, {"built_at": "2024-01-01T00:00:00+00:00"})
    rolled_back = pull(publish_one(other, str(tmp_path / "old"), session).reference, store, session)
    assert store.is_current(rolled_back.artifact), "a pulled one is replaced by any: that is how one goes back"
    again = pull(done.reference, store, session)
    assert again.fetched_bytes == 0
    assert not store.is_current(again.artifact)
    assert any("--replace makes it so" in event.text for event in reporter.events)
    assert store.is_current(pull(done.reference, store, session, replace=True).artifact)


def test_what_was_pulled_stays_so_when_it_is_measured_again(
    artifact: Artifact, session: Session, tmp_path: Path, store: Store
) -> None:
    pulled = pull(publish_one(artifact, str(tmp_path / "share"), session).reference, store, session).artifact
    mark = (pulled.folder.parent / ".pulled" / pulled.folder.name).read_text()
    measured = commit(store.root, pulled.folder, pulled.manifest)
    assert measured.is_pulled
    refused = set_aside(store.root, measured.folder, measured.manifest, REFUSED)
    assert refused.is_pulled
    assert not (refused.folder.parents[1] / ".pulled").exists()
    assert [item.folder for item in store.refused()] == [refused.folder]
    taken = commit(store.root, refused.folder, refused.manifest)
    assert (taken.folder.parent / ".pulled" / taken.folder.name).read_text() == mark
    assert not refused.folder.parent.exists()
    risk = AcceptedRisk(reason="a test", gates=("runs",))
    with_risk = taken.manifest.model_copy(update={"accepted_risk": risk}).sealed()
    kept = commit(store.root, set_aside(store.root, taken.folder, with_risk, REFUSED).folder, with_risk)
    assert kept.is_pulled
    assert kept.folder != taken.folder


def test_what_was_pulled_and_is_then_built_here_is_no_longer_so(
    artifact: Artifact, session: Session, tmp_path: Path, store: Store
) -> None:
    pulled = pull(publish_one(artifact, str(tmp_path / "share"), session).reference, store, session).artifact
    built = place(store.root, "q8_0", 0)
    assert built == pulled
    assert not built.is_pulled


def test_what_was_pulled_is_published_as_it_came(
    artifact: Artifact, session: Session, tmp_path: Path, store: Store
) -> None:
    done = publish_one(artifact, str(tmp_path / "share"), session)
    pulled = pull(done.reference, store, session)
    assert publish_one(pulled.artifact, str(tmp_path / "further"), session).digest == done.digest
