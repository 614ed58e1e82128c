"""The demo's real artifacts by way of a real registry, and ten seconds without it. Slow: pytest -m demo."""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from pathlib import Path

import pytest

from quantize.events import ListReporter
from quantize.publish.receive import pull
from quantize.publish.send import Wanted, publish
from quantize.publish.transfer import Session
from quantize.recipe.model import PublishPolicy
from quantize.store.artifact import Artifact, open_artifact
from quantize.store.store import Store
from tests.publish.conftest import Registry
from tests.publish.conftest import registry as registry
from tests.publish.proxy import Answer, Asked, Forward, proxy_before

pytestmark = pytest.mark.demo

STORE = Store(Path(__file__).parent.parent.parent / "artifacts")
if not (STORE.root / "smollm2-135m").is_dir():
    pytest.skip("make demo has not been run", allow_module_level=True)
POLICY = PublishPolicy(unevaluated="a test", refused="a test")


def copied(variant: str, tmp_path: Path) -> Artifact:
    """An artifact of the demo in a store of its own: publishing writes its card."""
    folder = STORE.find(f"smollm2-135m/{variant}").folder
    return open_artifact(Path(shutil.copytree(folder, tmp_path / "shelf/smollm2-135m" / variant / folder.name)))


@pytest.mark.parametrize("variant", ["q8_0", "awq-int4-g64"])
def test_the_demo_goes_out_and_comes_back(variant: str, registry: Registry, store: Store, tmp_path: Path) -> None:
    artifact, session = copied(variant, tmp_path), Session(ListReporter())
    target = f"oci://127.0.0.1:{registry.port}/demo"
    (done,) = publish([Wanted(artifact, POLICY)], target, tmp_path / "shelf", session)
    pulled = pull(done.reference, store, session)
    for entry in artifact.manifest.files:
        with (pulled.artifact.folder / entry.path).open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
    (again,) = publish([Wanted(artifact, POLICY)], target, tmp_path / "shelf", session)
    assert again.sent_bytes == 0


def test_ten_seconds_without_a_registry(tmp_path: Path, store: Store) -> None:
    """Killed in the middle of 145 MB, with all its uploads; it comes back after ten seconds."""
    registry = Registry(tmp_path)
    registry.start()
    artifact = copied("q8_0", tmp_path)

    def restart() -> None:
        registry.stop()
        time.sleep(10)
        registry.start()

    outage = threading.Thread(target=restart)
    with proxy_before(registry.port) as proxy:

        def rule(asked: Asked, forward: Forward) -> Answer | None:
            begun = asked.method == "PATCH" and asked.headers["Content-Range"].startswith("67108864-")
            if begun and not outage.ident:
                outage.start()
                time.sleep(0.2)
            return forward()

        proxy.rule = rule
        try:
            target = f"oci://{proxy.host}/demo"
            (done,) = publish([Wanted(artifact, POLICY)], target, tmp_path / "shelf", Session(ListReporter()))
            pulled = pull(done.reference, store, Session(ListReporter()))
            assert pulled.artifact.manifest == artifact.manifest
        finally:
            outage.join()
            registry.stop()
