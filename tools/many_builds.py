"""Many builds at once on one store: all end well, and each variant is built once, whoever wants it.

python -m tools.many_builds RECIPE [--builds 8] [--variants N] [-- OPTIONS OF BUILD]: starts them together, each with an
overlapping half of the recipe's variants (the first N), in a store and cache of its own; prints what each of them did
with every variant and a summary, and exits 1 if one failed, a variant was built twice, or anything was left behind.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantize.formats import option_models
from quantize.recipe.model import load_recipe
from quantize.store.store import Store
from tools.kill_build import broken_in, environment_of, leftovers_of

STATE = re.compile(r"^(\S+): (built|up to date|refused|failed|evaluated|skipped)\b", re.MULTILINE)


@dataclass(frozen=True)
class Ended:
    """One build: its exit code, variant -> what became of it, and what it said."""

    exit_code: int
    states: dict[str, str]
    said: str


def at_once(builds: Sequence[Sequence[str]], work: Path) -> list[Ended]:
    """Start `quantize build` with each of the arguments, all together, and wait for all."""
    environment = environment_of(work)
    command = [sys.executable, "-m", "quantize", "build"]
    logs = [tempfile.TemporaryFile("w+") for _ in builds]  # noqa: SIM115 - closed below, when all have ended
    started = [
        subprocess.Popen([*command, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=log)
        for arguments, log in zip(builds, logs, strict=True)
    ]
    ended = []
    for process, log in zip(started, logs, strict=True):
        process.wait()
        with log:
            log.seek(0)
            said = log.read()
        ended.append(Ended(process.returncode, dict(STATE.findall(said)), said))
    return ended


def problems(ended: Sequence[Ended], wanted: set[str], work: Path) -> list[str]:
    """What is not as it should be after builds that want some variants between them."""
    found = [f"exit {item.exit_code}: {item.said[-1000:]}" for item in ended if item.exit_code != 0]
    built = Counter(variant for item in ended for variant, state in item.states.items() if state == "built")
    found += [f"{variant} was built {built[variant]} times" for variant in sorted(wanted) if built[variant] != 1]
    others = {state for item in ended for state in item.states.values()} - {"built", "up to date"}
    found += [f"a variant is {state!r}" for state in sorted(others)]
    store = Store(work / "artifacts")
    folders = Counter(item.manifest.variant for item in store.artifacts())
    if folders != Counter(wanted):
        found.append(f"the store holds {dict(folders)}")
    return [*found, *broken_in(store)[1], *leftovers_of(work)]


def halves(variants: Sequence[str], count: int) -> list[list[str]]:
    """Overlapping halves (at least one) of some names: of each build, those from another one on."""
    size = max(1, (len(variants) + 1) // 2)
    return [[variants[(start + step) % len(variants)] for step in range(size)] for start in range(count)]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--builds", type=int, default=8)
    parser.add_argument("--variants", type=int, default=None)
    parser.add_argument("options", nargs="*")
    asked = parser.parse_intermixed_args()
    names = [variant.name for variant in load_recipe(asked.recipe, option_models()).variants][: asked.variants]
    parts = halves(names, asked.builds)
    with tempfile.TemporaryDirectory(prefix="quantize-many-") as work:
        commands = [
            [str(asked.recipe), *(f"--only={variant}" for variant in part), *asked.options] for part in parts
        ]  # fmt: skip
        ended = at_once(commands, Path(work))
        for item in ended:
            print(json.dumps({"exit": item.exit_code, **item.states}), flush=True)
        found = problems(ended, {name for part in parts for name in part}, Path(work))
    print(f"{len(ended)} builds at once of {len(names)} variants, {len(found)} problems")
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
