"""Give a build too little memory, and a little more each time: it says so, loses nothing, and ends with the same bits.

python -m tools.limit_memory RECIPE [--from 1000] [--step 200] [--points 10] [-- OPTIONS OF BUILD]: every process of a
build may have so many MiB of address space (RLIMIT_AS, as `ulimit -v` sets it), so that its steps are refused memory,
crash or are killed by their libraries. Prints a line for each limit and a summary, and exits 1 if one of them ended
without saying that memory ran out and what to lower, an artifact was refused or broken for it, anything was left
behind, or a digest differs from that of a build with memory enough.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.kill_build import broken_in, leftovers_of
from tools.kill_pass import Builds

SAID = ("out of memory", "--memory-budget")


class Limited(Builds):
    """Builds that may have so much address space."""

    def run_with(self, mebibytes: int) -> tuple[int, str]:
        """A build; its exit code and what it said."""

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_AS, (mebibytes << 20, mebibytes << 20))

        done = subprocess.run(
            self._command, env=self._environment, preexec_fn=limit, capture_output=True, text=True, check=False
        )  # fmt: skip
        return done.returncode, done.stderr


def problems_of(builds: Limited, code: int, said: str) -> list[str]:
    """What is wrong after a build that had too little."""
    problems = [f"it does not say {words!r}" for words in SAID if words not in said]
    problems += ["an artifact is refused, which nobody could look at"] if builds.store.refused() else []
    problems += ["an internal error"] if "internal error" in said else []
    problems += [f"exit {code}"] if code != 1 else []
    problems += broken_in(builds.store)[1]
    return [*problems, said[-1500:]] if problems else []


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--from", type=int, default=1000, dest="first", metavar="MIB")
    parser.add_argument("--step", type=int, default=200, metavar="MIB")
    parser.add_argument("--points", type=int, default=10)
    parser.add_argument("options", nargs="*")
    asked = parser.parse_intermixed_args()
    bad: list[str] = []
    with tempfile.TemporaryDirectory(prefix="quantize-limit-") as folder:
        builds = Limited(asked.recipe, Path(folder) / "limited", asked.options)
        short = 0
        for number in range(asked.points):
            mebibytes = asked.first + number * asked.step
            code, said = builds.run_with(mebibytes)
            wrong = problems_of(builds, code, said) if code else []
            short += code != 0
            print(json.dumps({"mib": mebibytes, "exit": code, "ok": not wrong, "problems": wrong}), flush=True)
            bad += wrong
            if code == 0:
                break
        code, said = builds.run()
        reference = Builds(asked.recipe, Path(folder) / "reference", asked.options)
        expected_code, _ = reference.run()
        same, left = builds.digests() == reference.digests(), leftovers_of(builds.work)
        print(f"{short} builds had too little memory; digests equal: {same}, left: {left}, {len(bad)} problems")
        bad += [*left, *([] if same else ["digests"]), *([] if code == expected_code else [said[-1500:]])]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
