"""A real registry on a loopback port, a proxy before it, and artifacts that may be published."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantize.events import ListReporter
from quantize.provenance.card import render_card
from quantize.publish.retry import Retry
from quantize.publish.send import Published, Wanted, publish
from quantize.publish.transfer import Session
from quantize.recipe.model import PublishPolicy
from quantize.store.artifact import Artifact, commit, describe_files, write_measurements
from quantize.store.manifest import SCHEMA_VERSION, Manifest, SourceEntry
from quantize.store.store import Store
from quantize.system.files import write_text
from tests.publish.proxy import Proxy, proxy_before

POLICY = PublishPolicy(unevaluated="a test of the way there")
QUICK = Retry(tries=10, first_seconds=0.02, longest_seconds=0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Registry:
    """Debian's docker-registry with a temporary root; it may be stopped and started again on its port."""

    def __init__(self, root: Path, settings: str = "") -> None:
        self.root, self.port = root, free_port()
        self._config = root / "config.yml"
        self._config.write_text(
            f"version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n"
            f"storage: {{filesystem: {{rootdirectory: {root / 'data'}}}, delete: {{enabled: true}}}}\n"
            f"http: {{addr: '127.0.0.1:{self.port}'}}\n{settings}"
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = (self.root / "log").open("ab")
        with log:
            command = ["docker-registry", "serve", str(self._config)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        give_up = time.monotonic() + 20
        while time.monotonic() < give_up and self._process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    return
            except OSError:
                time.sleep(0.02)
        raise AssertionError((self.root / "log").read_text())

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(20)

    def blob_file(self, digest: str) -> Path:
        """Where the registry keeps a blob."""
        digits = digest.removeprefix("sha256:")
        return self.root / "data/docker/registry/v2/blobs/sha256" / digits[:2] / digits / "data"

    def tags(self, repository: str) -> list[str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v2/{repository}/tags/list") as answer:
            return sorted(json.load(answer)["tags"] or [])


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """One registry for all tests; each uses a repository of its own."""
    if shutil.which("docker-registry") is None:
        pytest.skip("docker-registry is not installed")
    found = Registry(tmp_path_factory.mktemp("registry"))
    found.start()
    yield found
    found.stop()


@pytest.fixture
def proxy(registry: Registry) -> Iterator[Proxy]:
    """A proxy before the registry."""
    with proxy_before(registry.port) as found:
        yield found


SOURCE = SourceEntry(
    uri="/models/tiny", revision=None, name="tiny", base_model=None, license="apache-2.0", architecture="llama",
    parameters=200_000, weights_bytes=400_000, quantized_before=None, files=(),
)  # fmt: skip


def place(store: Path, variant: str, seed: int) -> Artifact:
    """An artifact like a build's, without the build: weights that are noise, and all papers."""
    folder = store / "tiny" / variant / "new"
    folder.mkdir(parents=True)
    (folder / f"tiny-{variant}.gguf").write_bytes(random.Random(seed).randbytes(200_000))
    (folder / "LICENSE").write_text("The licence of a tiny model.\n")
    (folder / "recipe.yaml").write_text("name: tiny\nsource: {model: /models/tiny}\nvariants: [{format: gguf}]\n")
    files = describe_files(folder, ("LICENSE", f"tiny-{variant}.gguf"))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION, name="tiny", variant=variant, format="gguf",
        options={"type": variant.upper()}, bits=8, group_size=None, bits_per_weight=8.5, weights_bytes=199_000,
        source=SOURCE, calibration=None, tools={"quantize": "0"}, device=None, files=files,
        kept_in_high_precision=(), size_bytes=sum(entry.size_bytes for entry in files), build_key="0" * 64,
    ).sealed()  # fmt: skip
    write_measurements(folder, {"built_at": "2026-01-01T00:00:00+00:00", "build_seconds": 1.0})
    write_text(folder / "README.md", render_card(manifest))
    return commit(store, folder, manifest)


@pytest.fixture
def shelf(tmp_path: Path) -> Store:
    """A store with artifacts that a test may spoil."""
    for seed, variant in enumerate(("q8_0", "q4_0")):
        place(tmp_path / "shelf", variant, seed)
    return Store(tmp_path / "shelf")


@pytest.fixture
def artifact(shelf: Store) -> Artifact:
    """One of them."""
    return shelf.find("tiny/q8_0")


@pytest.fixture
def reporter() -> ListReporter:
    """What the session tells."""
    return ListReporter()


@pytest.fixture
def session(reporter: ListReporter) -> Session:
    """Retries that a test can wait for."""
    return Session(reporter, jobs=3, retry=QUICK)


def publish_one(artifact: Artifact, target: str, session: Session, *, move_tag: bool = False) -> Published:
    """Publish one artifact that was never evaluated."""
    store = artifact.folder.parents[2]
    (done,) = publish([Wanted(artifact, POLICY)], target, store, session, move_tag=move_tag)
    return done
