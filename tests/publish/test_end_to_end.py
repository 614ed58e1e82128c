"""A GGUF and an AWQ artifact on their whole way: built, published, deleted, pulled by digest, verified, served."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from quantize.testing import write_recipe
from tests.conftest import Run
from tests.publish.conftest import Registry

pytest.importorskip("llama_cpp")
pytest.importorskip("gptqmodel", reason="needs the gptqmodel extra")
VARIANTS = [{"format": "gguf", "type": "Q8_0"}, {"format": "awq", "group_size": 64}]
CALIBRATION = {
    "dataset": "text.txt", "samples": 4, "sequence_length": 64, "minimum_tokens": 16, "precision": "float32",
}  # fmt: skip


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[str]:
    """`quantize serve` on a free port, ready, until the block ends; its address."""
    log = folder / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "quantize", "serve", "--port", "0", "--threads", "1", *arguments], stderr=output
        )
    try:
        give_up = time.monotonic() + 120
        while time.monotonic() < give_up:
            assert process.poll() is None, log.read_text()
            started = [line for line in log.read_text().splitlines() if '"listening"' in line]
            if started and _ready(json.loads(started[0])["url"]):
                break
            time.sleep(0.1)
        yield json.loads(started[0])["url"]
    finally:
        process.terminate()
        process.wait(40)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(url: str, model: str) -> Any:
    body = json.dumps({"model": model, "prompt": "The quick brown", "max_tokens": 4, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.filterwarnings("ignore")  # transformers and its plugins warn on import
def test_built_published_deleted_pulled_verified_served(
    tiny: Path, registry: Registry, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join(f"Line {n}: the quick brown fox jumps. " * 5 for n in range(6)))
    recipe = write_recipe(
        tmp_path / "tiny.yaml", tiny, VARIANTS, calibration=CALIBRATION, publish={"unevaluated": "tests its way only"}
    )
    assert run("build", recipe, "--no-eval").exit_code == 0
    names = ["tiny/q8_0", "tiny/awq-int4-g64"]
    result = run("publish", *names, "--to", f"oci://127.0.0.1:{registry.port}/e2e", "--json")
    assert result.exit_code == 0, result.stderr
    published = json.loads(result.stdout)
    shutil.rmtree(tmp_path / "artifacts")
    result = run("pull", *(item["reference"] for item in published))
    assert result.exit_code == 0, result.stderr
    assert "bytes" not in result.stdout
    result = run("verify", *names)
    assert (result.exit_code, result.stdout.count(": good")) == (0, 2), result.stderr
    again = json.loads(run("publish", *names, "--to", f"oci://127.0.0.1:{registry.port}/e2e", "--json").stdout)
    assert [item["sent_bytes"] for item in again] == [0, 0], "what came back is what went out"
    shutil.rmtree(tmp_path / "artifacts")
    assert run("pull", "--locked").exit_code == 0
    with serving(tmp_path, "--locked", "--store", os.environ["QUANTIZE_STORE"]) as url:
        for name in names:
            assert ask(url, name)["usage"]["completion_tokens"] == 4
