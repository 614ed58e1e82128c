"""A record of an evaluation as small as its readers take it, to which a test adds what it is about."""

from __future__ import annotations

from typing import Any


def evaluation_record(**parts: Any) -> dict[str, Any]:
    """What measurements.json has under `evaluation`."""
    return {
        "verdict": "accepted", "findings": [], "figures": {}, "limits": {}, "quality": None, "golden": None,
        "held_out": None, "artifact": {"name": "tiny/int8"}, "source": {"name": "tiny"},
        "machine": {"processor": "one", "cores": 2, "gpus": []}, **parts,
    }  # fmt: skip
