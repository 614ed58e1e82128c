"""Every decoder family through convert, quantize, load and one prompt: the answers are those of transformers.

A family that GGUF does not know is refused when it is planned. docs/architectures.md says what was measured.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from quantize.evaluate.structure import NEAR as NEAR_THE_SOURCE
from quantize.evaluate.structure import Intended, check_structure
from quantize.events import SilentReporter
from quantize.runtimes.base import ModelRef
from tests.canary import PAGE, measure, rows_of_page
from tests.families import FAMILIES, Family

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and its plugins warn on import
NEAR = 0.002  # nats between two processors
CELLS = rows_of_page(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_answers_are_those_of_transformers(family: Family, tmp_path: Path) -> None:
    row = measure(family, tmp_path)
    assert row.right or row.refused, row
    written, found = CELLS[family.name], row.cells()
    assert written[:6] == found[:6], "run: python -m tests.canary"
    assert written[8:] == found[8:], "run: python -m tests.canary"
    if row.right:
        assert abs(float(written[6]) - row.exact) < NEAR
        assert abs(float(written[7]) - row.kl) < NEAR
        artifact = ModelRef(tmp_path, "gguf", "tiny-Q8_0.gguf")
        checks = check_structure(SilentReporter(), artifact, tmp_path / "checkpoint", Intended(8))
        assert checks.get(NEAR_THE_SOURCE, "") == ""


def test_the_page_has_every_family_and_no_other() -> None:
    assert list(CELLS) == [family.name for family in FAMILIES]


def test_most_families_are_right() -> None:
    right = [name for name, cells in CELLS.items() if cells[8] == "same"]
    assert len(right) >= 28
