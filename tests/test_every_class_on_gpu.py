"""The pass and both solvers on the emulated GPU, for every class of docs/anatomy.md whose pass is proved on the CPU.

What CI runs with the other classes, by `pytest -m every_class`; the ten of tests/test_emulated_gpu.py always run.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architectures import token_ids
from tests.emulated.solving import hold_against_cpu
from tests.test_every_class import CELLS, tiny_checkpoint

pytestmark = [pytest.mark.every_class, pytest.mark.filterwarnings("ignore")]  # transformers warns of much
SCANS = {"bailing_hybrid", "kimi_linear", "qwen4_exp", "qwen4_exp_text"}  # which plain torch computes piece by piece


@pytest.mark.parametrize("kind", [kind for kind, cells in CELLS.items() if cells[2].startswith("proved")])
def test_the_whole_pass_and_both_solvers_on_a_gpu(kind: str, tmp_path: Path) -> None:
    _, checkpoint, anatomy = tiny_checkpoint(kind, tmp_path / "source")
    assert anatomy.refusal == ""
    solved = hold_against_cpu(checkpoint, token_ids(), scans=kind in SCANS)
    assert all(count >= 1 for count in solved.values())
