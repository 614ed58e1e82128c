"""Another scheduler is a module and a line: builds and spread passes on one that shares nothing with Ray."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from quantize.build.spread import cluster
from quantize.build.spread.cluster import SchedulerKind, check_address, connected, forms
from quantize.build.spread.schedule import GUIDE
from quantize.build.spread.trace import read_trace
from quantize.calibration.spread import PassSpread
from quantize.errors import UsageError
from quantize.testing import write_recipe
from tests.cluster.test_spread import Passes, Reporter
from tests.conftest import Built, Run

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and its plugins warn on import

FILES = SchedulerKind(("files",), "files://FOLDER", "tests.cluster.files:FILES")


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a cluster of files; its folder has a short name, for there are sockets in it."""
    monkeypatch.setattr(cluster, "SCHEDULERS", (*cluster.SCHEDULERS, FILES))
    folder = tempfile.mkdtemp(prefix="files-")
    yield f"files://{folder}"
    shutil.rmtree(folder)


def test_it_is_known_by_its_scheme(address: str) -> None:
    assert forms().endswith("ray://HOST:PORT or files://FOLDER")
    check_address(address)
    with pytest.raises(UsageError, match="no such folder"):
        check_address("files:///nowhere")
    with pytest.raises(UsageError, match="'other://x' is no address of a cluster"):
        check_address("other://x")


def test_a_pass_leaves_the_bytes_of_one_machine(
    address: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    passes, said = Passes(tmp_path_factory.mktemp("files")), Reporter()
    alone = passes.run(tmp_path / "alone")
    assert passes.run(tmp_path / "spread", PassSpread(address, workers=2, cores=1), said) == alone
    assert len({line for line in said.text.splitlines() if line.startswith("worker ")}) >= 1


def test_a_guided_pass_leaves_the_bytes_of_one_machine(
    address: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    passes, said = Passes(tmp_path_factory.mktemp("files")), Reporter()
    plain = passes.run(tmp_path / "plain")
    assert passes.recipe.calibration is not None
    spec = passes.recipe.calibration.model_copy(update={"guided": True})
    passes.recipe = replace(passes.recipe, calibration=spec)
    alone = passes.run(tmp_path / "alone")
    assert alone.keys() == plain.keys()
    assert alone != plain
    trace = tmp_path / "trace.json"
    assert passes.run(tmp_path / "spread", PassSpread(address, workers=2, cores=1, trace=trace), said) == alone
    assert sum(span.kind == GUIDE for span in read_trace(trace)) >= 2


def test_a_worker_that_dies_is_replaced(address: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    def kill(text: str) -> None:
        os.kill(int(re.findall(r"worker 0 is process (\d+)", text)[0]), signal.SIGKILL)

    passes, said = Passes(tmp_path_factory.mktemp("files")), Reporter("calibration pass, blocks 2", kill)
    found = passes.run(tmp_path / "spread", PassSpread(address, workers=1, cores=1), said)
    assert said.fired
    assert found == passes.run(tmp_path / "alone")
    assert "worker 0 is gone: its process ended; what it had in hand is given to another" in said.text


def test_builds_have_the_digests_of_a_build_alone(
    address: str, built: Built, tiny: Path, tmp_path: Path, run: Run
) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny, [{"format": "gguf", "type": "Q8_0"}])
    result = run("build", recipe, "--cluster", address, "--no-eval", "--json")
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)
    (alone,) = [item.artifact for item in built.outcomes if item.variant == "q8_0"]
    assert alone is not None
    assert found["digest"] == alone.manifest.digest


def test_only_ray_s_module_needs_ray(address: str) -> None:
    code = "import sys; sys.modules['ray'] = None\nimport quantize.cluster.units, quantize.build.spread.run"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with connected(address) as found:
        handle = found.put([1, 2])
        assert found.get(handle) == [1, 2]
