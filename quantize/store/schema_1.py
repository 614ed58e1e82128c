"""Manifests of schema 1, from before the VRAM estimate left what a digest is of -> the fields of today's.

In: the JSON data of a stored manifest. Out: the same facts under today's names. Schema 2 gave `weights_bytes` its own
name and left out the rest of `estimate`; moved `device` from `calibration` to beside `tools`; and has every field
always. A stored manifest is never written anew: its digest, which folders, pins and publications name, is of the data
as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def upgrade(data: Mapping[str, Any]) -> dict[str, Any]:
    """What today's Manifest takes. Raises ValueError: a field that changed is not what schema 1 has there."""
    fields = {key: value for key, value in data.items() if key != "estimate"}
    estimate, calibration = data.get("estimate"), data.get("calibration")
    if not isinstance(estimate, Mapping) or "weights_bytes" not in estimate:
        raise ValueError("`estimate.weights_bytes`: Field required")
    for key in ("weights_bytes", "device"):
        if key in data:
            raise ValueError(f"`{key}`: not a field of schema 1")
    device = None
    if isinstance(calibration, Mapping):
        device = calibration.get("device")
        fields["calibration"] = {key: value for key, value in calibration.items() if key != "device"}
    return {"accepted_risk": None, **fields, "weights_bytes": estimate["weights_bytes"], "device": device}
