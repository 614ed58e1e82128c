"""The clients that people use, against a real small model. Needs PyPI, npm, node and minutes: `pytest -m clients`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.clients.run import CLIENTS, run


@pytest.mark.clients
@pytest.mark.timeout(3600)
def test_no_call_fails_that_the_engine_can_do() -> None:
    assert shutil.which("node"), "node and npm are needed for the JavaScript client"
    reports = run(None, Path.home() / ".cache" / "quantize-clients")
    assert len(reports) == len(CLIENTS)
    for report in reports:
        assert [item for item in report["calls"] if not item["ok"]] == [], report["client"]
        assert len(report["calls"]) > 20
