"""The record of an evaluation: kept ones are read, decided on again and written without a change."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from quantize.evaluate.decision import GateThresholds, Verdict
from quantize.evaluate.gates import decide
from quantize.evaluate.record import Change, read_record
from quantize.evaluate.session import evidence
from tests.pages.measured import decided, evaluation
from tests.records import evaluation_record

STORED: dict[str, Any] = json.loads((Path(__file__).parent / "stored_record.json").read_text(encoding="utf-8"))
"""As it was written when the figures of the gates stood in it twice."""


def test_a_stored_record_is_read_and_stays_as_it_was() -> None:
    record = read_record({"evaluation": STORED})
    assert record is not None
    assert record.verdict is Verdict.REFUSED
    assert record.quality is not None
    assert record.quality.max_kl == math.inf
    assert record.golden is not None
    assert [item.change for item in record.golden.results].count(Change.LOST) == 3
    assert record.to_data() == STORED
    again = record.decided(decide(record, record.limits), record.limits)
    assert again.to_data() == STORED, "a build would write it anew, and it would no longer be what was signed"


def test_what_a_newer_version_added_is_kept() -> None:
    added = {**STORED, "later": 1, "quality": {**STORED["quality"], "later": {"a": [1.5]}}}
    record = read_record({"evaluation": added})
    assert record is not None
    assert record.decided(record.decision, record.limits).to_data() == added


def test_a_record_survives_json() -> None:
    found = evidence(evaluation(kl=math.inf, ratio=math.nan), size_bytes=1, source_bytes=2)
    record = decided(found, GateThresholds())
    data = json.loads(json.dumps(record.to_data(), allow_nan=False))
    read = read_record({"evaluation": data})
    assert read is not None
    assert read.to_data() == data
    assert read.verdict is Verdict.REFUSED


@pytest.mark.parametrize("part", list(evaluation_record()))
def test_a_record_without_one_of_its_parts_is_none(part: str) -> None:
    data = evaluation_record()
    assert read_record({"evaluation": data}) is not None
    del data[part]
    assert read_record({"evaluation": data}) is None
    assert read_record({}) is None
