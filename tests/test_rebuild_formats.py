"""Every format again, in surroundings that are as different as can be: the same digests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantize.artifact import Artifact
from quantize.backends import formats
from quantize.backends.base import Limits
from quantize.build import RunOptions, build
from quantize.cache import Cache
from quantize.recipe import load_recipe
from quantize.report import ListReporter
from quantize.store import Store
from quantize.testing import TinyModel, make_checkpoint, write_recipe

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and its plugins warn on import

ROOT = Path(__file__).parent.parent
VARIANTS: list[dict[str, Any]] = [
    {"format": "gguf", "type": "Q4_K_M"},
    {"format": "gguf", "type": "Q4_K_M", "imatrix": True},
    {"format": "gptq", "group_size": 64},
    {"format": "awq", "group_size": 64},
    {"format": "bitsandbytes", "type": "int8"},
]
NAMES = ("q4_k_m", "q4_k_m-imatrix", "gptq-int4-g64", "awq-int4-g64", "bnb-int8")
# The plain C locale without Python's rescue from it (PEP 538, PEP 540): text is ASCII wherever nobody says otherwise.
ELSEWHERE = {
    "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONHASHSEED": "4242", "TZ": "Asia/Ho_Chi_Minh",
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "USER": "somebody", "PYTHONPATH": str(ROOT),
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """All variants of a tiny model whose licence and text are not ASCII, built in this process."""
    root = tmp_path_factory.mktemp("formats")
    checkpoint = make_checkpoint(root / "models" / "tiny", TinyModel())
    (checkpoint / "LICENSE").write_text("Giấy phép của một mô hình tí hon.\n", encoding="utf-8")
    paragraphs = [f"Đoạn {index}: the quick brown fox jumps over the lazy dog. " * 3 for index in range(12)]
    (root / "text.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    calibration = {"dataset": "text.txt", "samples": 8, "sequence_length": 64, "minimum_tokens": 16}
    path = write_recipe(root / "tiny.yaml", Path("models/tiny"), VARIANTS, calibration=calibration)
    store = Store(root / "artifacts")
    options = RunOptions(Limits(threads=2), evaluate=False)
    outcomes = build(load_recipe(path, formats()), store, Cache(root / "cache"), ListReporter(), options)
    assert {item.variant: str(item.error) for item in outcomes if item.error} == {}
    return store


def rebuild_elsewhere(artifact: Artifact, tmp_path: Path) -> dict[str, Any]:
    """`quantize rebuild` with one thread, another umask, locale, hash seed, home and working folder."""
    work = tmp_path / "sömewhere else"
    work.mkdir()
    environment = {**os.environ, **ELSEWHERE, "HOME": str(work), "TMPDIR": str(work)}
    command = [sys.executable, "-m", "quantize", "rebuild", str(artifact.folder), "--threads", "1", "--json"]
    result = subprocess.run(
        command, capture_output=True, env=environment, cwd=work, umask=0o077, timeout=300, check=False
    )
    assert result.returncode in (0, 3), result.stderr.decode()
    data: dict[str, Any] = json.loads(result.stdout)
    return data


@pytest.mark.parametrize("name", NAMES)
def test_the_same_digest_elsewhere(name: str, store: Store, tmp_path: Path) -> None:
    artifact = store.find(f"tiny/{name}")
    data = rebuild_elsewhere(artifact, tmp_path)
    assert data["differences"] == []
    assert data["manifest_fields"] == []
    assert data["rebuilt_digest"] == data["digest"] == artifact.manifest.digest
