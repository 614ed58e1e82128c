"""Kill a build with SIGKILL at random moments, again and again: the store must never hold a broken artifact.

python -m tools.kill_build RECIPE [--rounds 20] [--seed 0] [--only VARIANT] [--no-eval]: works in a folder of its own,
prints a line for each round and a summary, and exits 1 if anything was broken. Every round starts from an empty store,
every fourth from an empty cache too: so kills fall into converting there, and in the others into quantizing, verifying,
measuring and committing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantize.errors import VerifyError
from quantize.events import SilentReporter
from quantize.store.artifact import open_artifact
from quantize.store.store import Store
from quantize.store.verify import check_files


@dataclass(frozen=True)
class Round:
    """One killed build: how far it got, what stood in the store then, and how the next build ended."""

    killed_after: float
    cold: bool
    was_running: bool
    good: int
    broken: tuple[str, ...]
    next_code: int
    leftovers: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Nothing broken, and the next build went well and cleaned up."""
        return not self.broken and self.next_code == 0 and not self.leftovers


def command(recipe: Path, work: Path, options: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The build as a user calls it, in a store and cache of this run."""
    return [sys.executable, "-m", "quantize", "build", str(recipe), "--quiet", "--json", *options], environment_of(work)


def environment_of(work: Path) -> dict[str, str]:
    """This process's, with a store and cache below a folder."""
    return {**os.environ, "QUANTIZE_STORE": str(work / "artifacts"), "QUANTIZE_CACHE": str(work / "cache")}


def build(recipe: Path, work: Path, options: Sequence[str] = ()) -> tuple[int, float]:
    """A build that nobody disturbs: exit code and seconds."""
    arguments, environment = command(recipe, work, options)
    start = time.perf_counter()
    code = subprocess.run(arguments, env=environment, stdout=subprocess.DEVNULL, check=False).returncode
    return code, time.perf_counter() - start


def killed_build(recipe: Path, work: Path, after: float, options: Sequence[str] = ()) -> bool:
    """Start a build and kill it, the process alone, after some seconds; whether it was still running then."""
    arguments, environment = command(recipe, work, options)
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def broken_in(store: Store) -> tuple[int, tuple[str, ...]]:
    """How many artifacts are good to the last byte, and what is wrong with anything else in sight."""
    problems = [f"{item.folder}: {item.reason}" for item in store.broken()]
    good = 0
    for artifact in store.artifacts():
        try:
            check_files(artifact, SilentReporter())
            good += 1
        except VerifyError as exc:
            problems.append(str(exc))
    for link in store.root.glob("*/*/current"):
        try:
            open_artifact(link.resolve())
        except VerifyError as exc:
            problems.append(f"{link}: {exc}")
    return good, tuple(problems)


def leftovers_of(work: Path) -> tuple[str, ...]:
    """Scratch that should be gone after a build that ended well."""
    found = [*(work / "artifacts").glob(".staging/*"), *(work / "artifacts").glob(".locks/*")]
    return tuple(str(path.relative_to(work)) for path in found)


def run(
    recipe: Path, work: Path, rounds: int, seed: int, *, options: Sequence[str] = (), cold: bool = True
) -> list[Round]:
    """All rounds. A kill falls anywhere in the time that the build takes undisturbed, measured first.

    cold: every fourth round starts with an empty cache; otherwise what is in work/cache stays.
    """
    store, randomness, results = Store(work / "artifacts"), random.Random(seed), []
    cold_seconds = undisturbed(recipe, work, options) if cold else 0.0
    shutil.rmtree(store.root, ignore_errors=True)
    warm_seconds = undisturbed(recipe, work, options)
    for number in range(rounds):
        shutil.rmtree(store.root)
        is_cold = cold and number % 4 == 3
        if is_cold:
            shutil.rmtree(work / "cache")
        after = randomness.uniform(0.05, cold_seconds if is_cold else warm_seconds)
        was_running = killed_build(recipe, work, after, options)
        time.sleep(0.3)  # the steps of the killed build see that it is gone
        good, broken = broken_in(store)
        code, _ = build(recipe, work, options)
        final_good, final_broken = broken_in(store)
        broken = (*broken, *final_broken, *(() if final_good else ("the next build left no artifact",)))
        results.append(Round(after, is_cold, was_running, good, broken, code, leftovers_of(work)))
        print(json.dumps({"round": number + 1, "ok": results[-1].ok, **results[-1].__dict__}), flush=True)
    return results


def undisturbed(recipe: Path, work: Path, options: Sequence[str]) -> float:
    """Seconds of a build that nobody kills."""
    code, seconds = build(recipe, work, options)
    if code != 0:
        raise SystemExit(f"the recipe does not build undisturbed (exit {code})")
    return seconds


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], metavar="VARIANT")
    parser.add_argument("--no-eval", action="store_true", help="build without measuring")
    asked = parser.parse_args()
    options = [argument for variant in asked.only for argument in ("--only", variant)]
    options += ["--no-eval"] if asked.no_eval else []
    with tempfile.TemporaryDirectory(prefix="quantize-kill-") as work:
        results = run(asked.recipe, Path(work), asked.rounds, asked.seed, options=options)
    killed, bad = sum(item.was_running for item in results), [item for item in results if not item.ok]
    print(f"{len(results)} rounds, {killed} killed while running, {len(bad)} went wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
