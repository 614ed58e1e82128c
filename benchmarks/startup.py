"""Seconds of the commands that must feel instant: `quantize --help`, a list, and a build with nothing to do.

    python benchmarks/startup.py [RECIPE]      # RECIPE must have been built in this store

Prints JSON: the least of several runs, wall-clock and user time.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 7


def measure(*command: str) -> dict[str, float]:
    """The least wall-clock and user seconds of a command."""
    program = str(Path(sys.executable).with_name("quantize"))
    wall, user = [], []
    for _ in range(ROUNDS):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime, time.perf_counter()
        subprocess.run([program, *command], check=True, capture_output=True)
        wall.append(time.perf_counter() - started)
        user.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    return {"wall_seconds": round(min(wall), 3), "user_seconds": round(min(user), 3)}


def main() -> None:
    """Measure all three."""
    recipe = sys.argv[1] if len(sys.argv) > 1 else "recipes/smollm2-135m.yaml"
    found = {
        "help": measure("--help"),
        "list_artifacts": measure("list", "artifacts"),
        "build_up_to_date": measure("build", recipe, "-q"),
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
