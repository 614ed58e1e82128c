"""One build with nothing replaced: the source and the artifact each in a worker of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from quantize.testing import write_recipe
from tests.conftest import Built, Run

pytest.importorskip("torch")
pytest.importorskip("llama_cpp")


def test_a_build_is_measured_in_workers(built: Built, tiny: Path, run: Run, tmp_path: Path) -> None:
    shutil.copytree(built.cache.root, tmp_path / "cache")
    evaluation = {"window": 64, "windows": 1, "golden": []}
    path = write_recipe(tmp_path / "tiny.yaml", tiny, [{"format": "gguf", "type": "Q8_0"}], evaluation=evaluation)
    result = run("build", path, "--json")
    assert result.exit_code == 0, result.stderr
    (item,) = json.loads(result.stdout)
    assert 0 < item["evaluation"]["mean_kl"] < 0.001
    assert "warning" not in result.stderr
