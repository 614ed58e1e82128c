"""Commands in a process whose surroundings are as different as can be from those of the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from quantize.system.processor import MKL_MODE

ROOT = Path(__file__).parent.parent
# The plain C locale without Python's rescue from it (PEP 538, PEP 540): text is ASCII wherever nobody says otherwise.
ENVIRONMENT = {
    "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONHASHSEED": "4242", "TZ": "Asia/Ho_Chi_Minh",
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "USER": "somebody",
}  # fmt: skip


def run_elsewhere(work: Path, *args: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command with another umask, locale, hash seed, home and folder. work: an empty one, for all it writes."""
    here = work / "sömewhere else"
    here.mkdir()
    places = {"HOME": str(here), "TMPDIR": str(here), "QUANTIZE_CACHE": str(here / "cache")}
    places |= {"QUANTIZE_STORE": str(here / "artifacts")}
    inherited = {name: value for name, value in os.environ.items() if name != MKL_MODE}  # the program sets it
    code = os.pathsep.join([str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])])
    environment = {**inherited, **ENVIRONMENT, **places, "PYTHONPATH": code}
    command = [sys.executable, "-m", "quantize", *args]
    return subprocess.run(command, capture_output=True, env=environment, cwd=here, umask=0o077, check=False)


def rebuild_elsewhere(folder: Path, work: Path, *options: str) -> dict[str, Any]:
    """What `rebuild --json` says of an artifact, elsewhere and with one thread. work: an empty folder."""
    result = run_elsewhere(work, "rebuild", str(folder.absolute()), "--threads", "1", "--json", *options)
    assert result.returncode in (0, 3), result.stdout.decode() + result.stderr.decode()
    data: dict[str, Any] = json.loads(result.stdout)
    return data
