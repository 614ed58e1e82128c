"""What a card says about running an artifact, run: the Python blocks, as they stand, in the artifact's own folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantize.provenance.documents import write_documents
from quantize.store.store import Store

STORE = Path(__file__).parent.parent.parent / "artifacts"
pytestmark = [pytest.mark.demo, pytest.mark.skipif(not STORE.is_dir(), reason="make demo builds the artifacts")]


@pytest.mark.parametrize("variant", ["q8_0", "awq-int4-g64", "gptq-int4-g64", "bnb-int8"])
def test_the_python_block_of_the_card_answers(variant: str, tmp_path: Path) -> None:
    artifact = Store(STORE).find(f"smollm2-135m/{variant}")
    write_documents(artifact, tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=artifact.folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
