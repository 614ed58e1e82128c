"""A llama.cpp compiled for another processor, really run: what build, verify, serve, eval and doctor say of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from quantize.cli.diagnosis import examine
from quantize.cli.trials import try_engine
from quantize.runtimes.llama_cpp.probe import LLAMA_CPP_PROBE, write_tiny_llama
from tests import stubs
from tests.conftest import Built, Run

pytest.importorskip("llama_cpp")

ROOT = Path(__file__).parent.parent
WORDS = "SIGILL: llama.cpp here was compiled for instructions that this processor does not have"
REPAIR = 'CMAKE_ARGS="-DGGML_NATIVE=OFF'
PIP = f"pip install --force-reinstall --no-cache-dir --no-deps llama-cpp-python=={version('llama-cpp-python')}"
KINDS = {"at once": stubs.DIES_AT_ONCE, "loaded": stubs.DIES_WHEN_LOADED, "in batches": stubs.DIES_IN_BATCHES}


@pytest.fixture(params=KINDS)
def broken(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library of one kind, in the place of the real one for every process that is started."""
    folder = stubs.library(tmp_path / "library", KINDS[request.param])
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(folder))
    return folder


def holds(text: str) -> None:
    """What every message must have: what it is, and one whole line that repairs it."""
    assert WORDS in text
    assert any(REPAIR in line and line.rstrip().endswith(PIP) for line in text.splitlines()), text
    assert "Traceback" not in text


@pytest.mark.usefixtures("broken")
def test_build_says_it_once_for_all_that_it_hit(built: Built, tmp_path: Path, run: Run) -> None:
    recipe = built.root / "tiny.yaml"
    result = run("build", recipe, "--only", "q8_0", "--only", "q4_0", "--no-eval", "--store", tmp_path / "store")
    assert result.exit_code == 1
    _, _, summary = result.stderr.partition("2 of 2 variants failed: ")
    assert "(q8_0, q4_0)" in summary.splitlines()[0]
    assert summary.count(WORDS) == 1
    holds(summary)


@pytest.mark.usefixtures("broken")
def test_verify_says_it(built: Built, run: Run) -> None:
    result = run("verify", "tiny/q8_0", "--store", built.store.root)
    assert result.exit_code == 1, "the artifact is not refused: it was not looked at"
    holds(result.stderr)


@pytest.mark.usefixtures("broken")
def test_doctor_says_it_and_that_gguf_can_not_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = try_engine(LLAMA_CPP_PROBE)
    assert trial.state == "died"
    holds(f"{trial.problem}\n{trial.repair}")
    assert "\n" not in str(trial.repair)
    monkeypatch.setattr("quantize.cli.diagnosis.try_engines", lambda _: (trial,))
    abilities = {item.format: item for item in examine(tmp_path, tmp_path).abilities}
    assert abilities["gguf"].build_broken == abilities["gguf"].serve_broken == ("llama.cpp",)
    assert abilities["gptq"].build_broken == abilities["gptq"].serve_broken == ()


@pytest.fixture
def gateway(broken: Path, built: Built, tmp_path: Path) -> Iterator[int]:
    """The port of `quantize serve` with the broken library."""
    pytest.importorskip("fastapi")
    log = (tmp_path / "log").open("w+b")
    command = [sys.executable, "-m", "quantize", "serve", "tiny/q8_0", "--store", str(built.store.root), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT)}) as it:
        try:
            yield _port(tmp_path / "log", it)
        finally:
            it.send_signal(signal.SIGTERM)
            it.wait(30)
    log.close()


def _port(log: Path, process: subprocess.Popen[bytes]) -> int:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        for line in log.read_text(encoding="utf-8").splitlines():
            if '"listening"' in line:
                return int(json.loads(line)["url"].rpartition(":")[2])
        time.sleep(0.1)
    raise AssertionError(log.read_text(encoding="utf-8"))


def test_serve_is_never_ready_and_says_it(gateway: int) -> None:
    answer = {}
    end = time.monotonic() + 60
    while time.monotonic() < end and answer.get("models", {}).get("tiny/q8_0", {}).get("state") != "failed":
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{gateway}/ready", timeout=10)
        except urllib.error.HTTPError as refused:
            answer = json.load(refused)
        else:
            pytest.fail("it is ready, and dies at every real prompt")
        time.sleep(0.2)
    assert answer["models"]["tiny/q8_0"]["state"] == "failed"
    holds(answer["reason"])


def test_the_stub_in_front_of_the_real_library_is_the_real_one_but_for_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So what the tests above see is the death, not a stub that lacks half of the library."""
    whole = stubs.library(tmp_path / "whole", "int nothing_of_llama_cpp;")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(whole))
    assert try_engine(LLAMA_CPP_PROBE).state == "works"
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(stubs.library(tmp_path / "batches", stubs.DIES_IN_BATCHES)))
    code = (
        "import sys\nfrom pathlib import Path\nfrom quantize.runtimes.llama_cpp.model import *\n"
        "model = OpenModel(Path(sys.argv[1]), ModelSettings(64))\n"
        "tokens = int(sys.argv[2])\n"
        "model.decode(BatchToken(1, index, 0, index == tokens - 1) for index in range(tokens))\n"
    )

    write_tiny_llama(tmp_path / "tiny.gguf")
    codes = [
        subprocess.run(
            [sys.executable, "-c", code, tmp_path / "tiny.gguf", str(tokens)],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60,
        ).returncode
        for tokens in (1, 31, 32)
    ]  # fmt: skip
    assert codes == [0, 0, -signal.SIGILL]
