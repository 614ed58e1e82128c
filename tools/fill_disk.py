"""Fill the disk under a build at many points: the store stays whole, the message says what is missing, it goes on.

python -m tools.fill_disk RECIPE [--points 10] [--inline] [--ext4] [-- OPTIONS OF BUILD]: works on a file system of its
own (a tmpfs, or an ext4 in a file; it needs to be allowed to mount one), prints a line for each point and a summary,
and exits 1 if anything was broken, unsaid or left behind, or a digest differs from that of a build with room enough. It
is one build, whose disk becomes as small as what it holds as soon as a share of the peak is written; then there is room
again, and it goes on.

--inline has the steps run in this process and the disk small from the start of each build: a tiny model takes seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

from quantize.events import Reporter
from quantize.store.store import Store
from quantize.system import process as worker
from tools.kill_build import broken_in, environment_of, leftovers_of
from tools.small_disk import SmallDisk, loop_disk, small_disk

MISSING = re.compile(r"([\d,]+) bytes are missing")
ROOM = 64 << 30
LOOP_ROOM = 4 << 30
POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Fill:
    """One build whose disk was full. at: bytes that were taken then. missing: how many it says that it lacks."""

    at: int
    exit_code: int
    missing: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """It ended with an error that says what is missing, and nothing is broken."""
        return not self.problems


class Command:
    """Builds by the real command, in a folder on a small disk."""

    def __init__(self, recipe: Path, disk: SmallDisk, options: Sequence[str]) -> None:
        self.disk, self.work = disk, disk.folder / "work"
        self.store, self.peak = Store(self.work / "artifacts"), 0
        self._command = [sys.executable, "-m", "quantize", "build", str(recipe), *options]
        self._plan, self._measured = ["plan", str(recipe), "--json"], "--no-eval" not in options
        self._environment = environment_of(self.work)

    def run(self, full_at: int | None = None) -> tuple[int, str]:
        """A build; as soon as so many bytes are taken the disk is full. Exit code and what it said."""
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(self._command, env=self._environment, stdout=subprocess.DEVNULL, stderr=said)
            small = False
            while process.poll() is None:
                used = self.disk.used_bytes
                self.peak = max(self.peak, used)
                if full_at is not None and not small and used >= full_at:
                    self.disk.resize(0)
                    small = True
                time.sleep(POLL_SECONDS)
            said.seek(0)
            return process.returncode, said.read()

    def planned(self) -> int:
        """Bytes that the plan says the build takes at its peak."""
        command = [*self._command[:3], *self._plan]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=True)
        return self._needed(done.stdout)

    def _needed(self, output: str) -> int:
        data = json.loads(output)
        return int(data["disk_needed_bytes"]) - (0 if self._measured else int(data["disk_parts"]["baseline"]))


class Inline(Command):
    """The same builds in this process, but for loading in transformers; nothing is refused before it begins."""

    def run(self, full_at: int | None = None) -> tuple[int, str]:
        """A build on a disk of so many bytes."""
        import click.testing

        from quantize.cli import main

        self.disk.resize(full_at or ROOM)
        with _steps_inline(), self._watched(), mock.patch.dict(os.environ, self._environment):
            steps = import_module("quantize.build.execute")
            unchecked = mock.patch.object(steps, "check_room") if full_at else contextlib.nullcontext()
            with unchecked, contextlib.redirect_stderr(io.StringIO()):
                result = click.testing.CliRunner().invoke(main, self._command[3:], prog_name="quantize")
        return result.exit_code, result.stderr

    def planned(self) -> int:
        """The same, in this process."""
        import click.testing

        from quantize.cli import main

        with _steps_inline(), mock.patch.dict(os.environ, self._environment):
            return self._needed(click.testing.CliRunner().invoke(main, self._plan, prog_name="quantize").stdout)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(POLL_SECONDS):
                self.peak = max(self.peak, self.disk.used_bytes)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


@contextlib.contextmanager
def _steps_inline() -> Iterator[None]:
    def run_step(step: str, reporter: Reporter, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if step.startswith("loading in transformers"):
            return {}
        for how in ("stops", "most_seconds"):
            kwargs.pop(how, None)
        work = pickle.dumps((function, args, kwargs))
        return worker._answer(step, *worker._outcome(work, reporter), 0)

    importers = [
        module for name, module in sys.modules.items()
        if name.startswith("quantize.") and getattr(module, "run_step", None) is worker.run_step
    ]  # fmt: skip
    with contextlib.ExitStack() as patches:
        for module in importers:
            patches.enter_context(mock.patch.object(module, "run_step", run_step))
        yield


def fill_again_and_again(builds: Command, points: Sequence[int]) -> list[Fill]:
    """Let one build find the disk full at each of the points, as long as it lasts; in the end there is room."""
    fills: list[Fill] = []
    for at in points:
        before, _ = broken_in(builds.store)
        code, said = builds.run(full_at=at)
        builds.disk.resize(ROOM)
        if code == 0:
            break
        good, broken = broken_in(builds.store)
        found = MISSING.search(said)
        problems = [*broken, *(["an artifact is gone"] if good < before else [])]
        problems += [] if found else ["it does not say how many bytes are missing"]
        problems += ["a traceback, or an internal error"] if "internal error" in said or "Traceback" in said else []
        problems += [] if code in (1, 3) else ["its exit code is neither 1 nor 3"]
        missing = int(found[1].replace(",", "")) if found else 0
        fills.append(Fill(at, code, missing, tuple([*problems, said[-2000:]] if problems else ())))
        print(json.dumps({"fill": len(fills), "ok": fills[-1].ok, **fills[-1].__dict__}), flush=True)
    return fills


def compare(
    kind: type[Command], recipe: Path, folder: Path, points: int, options: Sequence[str], *, ext4: bool = False
) -> list[str]:
    """All of it on a disk at `folder`; what went wrong."""
    make_disk, room = (loop_disk, LOOP_ROOM) if ext4 else (small_disk, ROOM)
    with make_disk(folder, room) as disk:
        empty = disk.used_bytes
        reference = kind(recipe, disk, options)
        planned = reference.planned()
        code, said = reference.run()
        peak, expected = reference.peak, _digests(reference.store)
        if code not in (0, 3) or not expected:
            raise SystemExit(f"the recipe does not build with room enough (exit {code}):\n{said[-2000:]}")
    with make_disk(folder.with_name("filled"), room) as disk:
        builds = kind(recipe, disk, options)
        shares = [(peak - empty) * number // (points + 1) for number in range(1, points + 1)]
        fills = fill_again_and_again(builds, [empty + share for share in shares])
        last, said = builds.run()
        same, left = _digests(builds.store) == expected, leftovers_of(builds.work)
    wrong = [problem for item in fills for problem in item.problems]
    print(f"planned {planned:,} bytes, taken {peak - empty:,}: ratio {planned / (peak - empty):.4f}")
    print(
        f"{len(fills)} of {points} points below {peak:,} bytes; digests equal: {same}, left: {left}, {len(wrong)} wrong"
    )
    wrong += [] if len(fills) == points else [f"only {len(fills)} builds met a full disk"]
    wrong += [] if last == code else [f"the last build ended with {last}: {said[-2000:]}"]
    return [*wrong, *([] if same else ["digests differ"]), *left]


def _digests(store: Store) -> dict[str, str]:
    found = [*(item for item in store.artifacts() if store.is_current(item)), *store.refused()]
    return {item.manifest.variant: item.manifest.digest for item in found}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--points", type=int, default=10)
    parser.add_argument("--inline", action="store_true", help="run the steps in this process")
    parser.add_argument("--ext4", action="store_true", help="on an ext4 in a file of 4 GiB, not a tmpfs")
    parser.add_argument("options", nargs="*")
    asked = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory(prefix="quantize-fill-") as folder:
        kind = Inline if asked.inline else Command
        problems = compare(kind, asked.recipe, Path(folder) / "disk", asked.points, asked.options, ext4=asked.ext4)
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
