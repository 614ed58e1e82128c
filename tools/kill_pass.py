"""Stop a calibrated build over and over, at every block and at random moments: it goes on, and ends with the same bits.

python -m tools.kill_pass RECIPE [--blocks] [--random 30] [--signal KILL] [--seed 0] [-- OPTIONS OF BUILD]: works in a
folder of its own, prints a line for each stop and a summary, and exits 1 if a digest differs, more than one block's
work was lost, or anything was left behind. One build is stopped again and again until it ends; the next begins in a
folder of its own, until there were N random stops.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quantize.store.staging import INPUTS_NAME, RESUME_NAME, STAGING, read_json
from quantize.store.store import Store
from tools.kill_build import environment_of, leftovers_of

ENDS = (0, 3)  # a build that ends: with all variants, or with some that the gates refuse
PART_OF_BUILD = 0.25  # of the seconds of an undisturbed build: the latest moment of a stop
Moments = Iterator[tuple[str, Callable[[float], bool]]]
GOES_ON = re.compile(r"goes on after block (\d+) of (\d+)")


@dataclass(frozen=True)
class Stop:
    """One stopped build. done: blocks on record then. goes_on: after which block the next one went on, None: unsaid."""

    moment: str
    exit_code: int
    done: int
    goes_on: int | None

    @property
    def ok(self) -> bool:
        """All blocks on record are used: at most the one that was under way is done again."""
        return self.done == (self.goes_on or 0)


class Builds:
    """Builds of one recipe in one folder."""

    def __init__(self, recipe: Path, work: Path, options: Sequence[str]) -> None:
        self.work, self.store = work, Store(work / "artifacts")
        self._command = [sys.executable, "-m", "quantize", "build", str(recipe), *options]
        self._environment = environment_of(work)

    def run(
        self, until: Callable[[float], bool] = lambda _: False, stop: signal.Signals = signal.SIGKILL
    ) -> tuple[int, str]:
        """Start a build, send it a signal once `until(seconds)` holds; its exit code and what it said."""
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(self._command, env=self._environment, stdout=subprocess.DEVNULL, stderr=said)
            started, sent = time.monotonic(), False
            while process.poll() is None:
                if not sent and until(time.monotonic() - started):
                    process.send_signal(stop)
                    sent = True
                time.sleep(0.005)
            time.sleep(0.3 if sent else 0)  # the steps of a killed build see that it is gone
            said.seek(0)
            return process.returncode, said.read()

    def blocks_done(self) -> int:
        """Blocks that every part of a stopped pass has on record; a part that has nothing yet has none."""
        done = []
        for scratch in self.store.root.glob(f"{STAGING}/*.scratch"):
            found = read_json(scratch / RESUME_NAME)
            begun = "blocks" in found or (not found and bool(read_json(scratch / INPUTS_NAME).get("calibration")))
            done += [int(found.get("blocks", 0))] if begun else []
        return min(done, default=0)

    def digests(self) -> dict[str, str]:
        """Digest of each variant's current artifact."""
        found = [item for item in self.store.artifacts() if self.store.is_current(item)]
        found += self.store.refused()
        return {item.manifest.variant: item.manifest.digest for item in found}


def at_blocks(builds: Builds) -> Moments:
    """Stop as soon as one more block is on record."""
    while True:
        before = builds.blocks_done()
        yield f"after block {before + 1}", lambda _seconds, before=before: builds.blocks_done() > before  # type: ignore[misc]


def at_random(seed: int, longest: float) -> Moments:
    """Stop some seconds after the start; what is done adds up, so a build is stopped some ten times before it ends."""
    randomness = random.Random(seed)
    while True:
        after = randomness.uniform(0.05, longest * PART_OF_BUILD)
        yield f"after {after:.2f} s", lambda seconds, after=after: seconds >= after  # type: ignore[misc]


def stopped_again_and_again(builds: Builds, moments: Moments, stop: signal.Signals, most: int | None) -> list[Stop]:
    """Stop one build at the moments, as long as it lasts and at most so often; in the end it is left to finish."""
    stops: list[Stop] = []
    for moment, until in itertools.islice(moments, most):
        code, said = builds.run(until, stop)
        _went_on(stops, said, ended=code in ENDS)
        if code in ENDS:
            return stops
        done = builds.blocks_done()
        if stops and stops[-1].goes_on is None and done == stops[-1].done:
            stops[-1] = replace(stops[-1], goes_on=done)  # stopped again before it said anything, and nothing is lost
        stops.append(Stop(moment, code, done, None))
    code, said = builds.run()
    if code not in ENDS:
        raise SystemExit(f"the build did not end well (exit {code}):\n{said[-2000:]}")
    _went_on(stops, said, ended=True)
    return stops


def check(builds: Builds, stops: list[Stop], expected: dict[str, str]) -> bool:
    """Print what came of one build that was stopped; whether all is well."""
    same, left = builds.digests() == expected, leftovers_of(builds.work)
    wrong = [item for item in stops if not item.ok]
    said = f"digests equal: {same}, lost more than a block: {len(wrong)}, left: {left}"
    print(f"{builds.work.name}: {len(stops)} stops, {said}", flush=True)
    return same and not wrong and not left


def _went_on(stops: list[Stop], said: str, *, ended: bool) -> None:
    """Fill in what the build after the last stop said; one that was stopped before it said anything is no witness."""
    found = GOES_ON.search(said)
    if not stops or not (found or ended):
        return
    stops[-1] = replace(stops[-1], goes_on=int(found[1]) if found else None)
    print(json.dumps({"stop": len(stops), "ok": stops[-1].ok, **stops[-1].__dict__}), flush=True)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--blocks", action="store_true", help="stop at every block")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="stop at N random moments")
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT"], default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*")
    asked = parser.parse_intermixed_args()
    stop, well = signal.Signals[f"SIG{asked.signal}"], True
    with tempfile.TemporaryDirectory(prefix="quantize-pass-") as folder:
        reference = Builds(asked.recipe, Path(folder) / "reference", asked.options)
        started = time.monotonic()
        code, said = reference.run()
        longest, expected = time.monotonic() - started, reference.digests()
        if not expected:
            raise SystemExit(f"the recipe does not build undisturbed (exit {code}):\n{said[-2000:]}")
        if asked.blocks:
            builds = Builds(asked.recipe, Path(folder) / "blocks", asked.options)
            well &= check(builds, stopped_again_and_again(builds, at_blocks(builds), stop, None), expected)
        moments, missing = at_random(asked.seed, longest), asked.random
        while missing > 0:
            builds = Builds(asked.recipe, Path(folder) / f"random-{asked.random - missing}", asked.options)
            stops = stopped_again_and_again(builds, moments, stop, missing)
            well &= check(builds, stops, expected)
            missing -= len(stops)
            shutil.rmtree(builds.work)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
