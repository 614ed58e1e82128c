"""kill -9 of a real build, a few times; kill_build.py does it as often as one likes, on any recipe."""

from __future__ import annotations

import shutil
from pathlib import Path

from quantize.testing import write_recipe
from tests.conftest import Built
from tests.kill_build import run


def test_a_killed_build_leaves_nothing_broken(built: Built, tiny: Path, tmp_path: Path) -> None:
    """The converted file is in the cache already, so that kills fall into quantizing, verifying and committing."""
    shutil.copytree(built.cache.root, tmp_path / "cache")
    path = write_recipe(tmp_path / "tiny.yaml", tiny, [{"format": "gguf", "types": ["Q4_K_M", "Q8_0"]}])
    results = run(path, tmp_path, rounds=6, seed=20, options=["--no-eval", "--keep-intermediates"], cold=False)
    assert [item for item in results if not item.ok] == []
    assert any(item.was_running for item in results)  # how many depends on what else the machine does
