"""The numbers of records: floats that JSON may have no word for, counts, intervals.

In: plain data. Out: pydantic types for the models of record.py and task_record.py.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

from quantize.evaluate.decision import RecordModel

NOT_FINITE = ("inf", "-inf", "nan")  # JSON has no words for these floats: records spell them


def _from_json(value: Any) -> Any:
    return float(value) if value in NOT_FINITE else value


def plain(value: Any) -> Any:
    """A float that JSON has no word for as its name; anything else as it is."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[
    float,
    BeforeValidator(lambda value: _from_json(value) if isinstance(value, str) else value),
    PlainSerializer(plain, when_used="json"),
]
Count = Annotated[int, Field(ge=0, le=1 << 62)]


class Interval(RecordModel):
    """Where a figure lies, with 95 % confidence: see intervals.py."""

    low: Number
    high: Number

    @property
    def half_width(self) -> float:
        """Half of how wide it is."""
        return (self.high - self.low) / 2
