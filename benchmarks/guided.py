"""Guided statistics against plain ones: GPTQ, AWQ and an importance matrix from the same text, in one run.

    python benchmarks/guided.py [--checkpoints dithered plain] [--work FOLDER]

For each checkpoint of the demo model (as it is, and with its weights off every 4-bit grid): one build without and one
with `guided: true`, of the same 32 x 512 tokens of python-docs; then KL divergences from the source, with intervals, on
the topics after those that were calibrated on and on other kinds of text. Prints a Markdown table for each, and JSON
with the seconds of both passes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

TEXT = {"dataset": "python-docs", "samples": 32, "sequence_length": 512}
VARIANTS = [
    {"format": "gptq", "group_size": 64},
    {"format": "awq", "group_size": 64},
    {"format": "gguf", "type": "Q4_K_M", "imatrix": True},
]
KINDS = ("prose", "code")


def recipe(work: Path, checkpoint: Path, name: str, *, guided: bool, formats: list[str], windows: int) -> Path:
    """Write the recipe of one build."""
    kinds = {"topics": "python-docs"} | {kind: str(ROOT / "evaluation" / f"{kind}.txt") for kind in KINDS}
    data = {
        "name": name,
        "source": {"model": str(checkpoint), "license": "apache-2.0"},
        "calibration": TEXT | ({"guided": True} if guided else {}),
        "variants": [variant for variant in VARIANTS if variant["format"] in formats],
        "evaluation": {"text": kinds, "golden": [], "windows": windows},
        "gates": {"max_kl": 100, "max_perplexity_ratio": 1e6, "max_size_ratio": 100},
    }
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


def build(path: Path, work: Path) -> None:
    """Build and measure what a recipe says."""
    environment = os.environ | {"QUANTIZE_STORE": str(work / "store"), "QUANTIZE_CACHE": str(work / "cache")}
    command = [sys.executable, "-m", "quantize", "build", str(path)]
    if subprocess.run(command, env=environment, cwd=ROOT, stdout=sys.stderr, check=False).returncode:
        raise SystemExit(f"the build of {path} failed")


def seconds(work: Path, name: str) -> dict[str, Any]:
    """Of the pass of a build."""
    measured = next((work / "store" / name).glob("*/current/measurements.json"))
    found: dict[str, Any] = json.loads(measured.read_text(encoding="utf-8"))["calibration_pass"]
    wanted = ("seconds", "import_seconds", "text_seconds", "guided_seconds", "peak_memory_bytes")
    return {key: found[key] for key in wanted if key in found}


def main() -> None:
    """Build, measure, print."""
    from benchmarks import models
    from benchmarks.calibration_mixes import read, table

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoints", nargs="+", choices=["plain", "dithered"], default=["dithered", "plain"])
    parser.add_argument("--formats", nargs="+", default=["gptq", "awq", "gguf"])
    parser.add_argument("--windows", type=int, default=0, help="of 512 tokens of each kind of text; 0 for all")
    parser.add_argument("--work", type=Path, help="folder for checkpoints, cache and store, kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        options: dict[str, Any] = {"formats": arguments.formats, "windows": arguments.windows}
        work = (arguments.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "plain").is_dir():
            models.demo(work / "plain")
        if not (work / "dithered").is_dir():
            models.dithered(work / "plain", work / "dithered")
        for checkpoint in arguments.checkpoints:
            found, times = [], {}
            for guided in (False, True):
                name = f"{checkpoint}-{'guided' if guided else 'even'}"
                build(recipe(work, work / checkpoint, name, **options, guided=guided), work)
                found.append(("guided" if guided else "every token alike", read(work / "store", name)))
                times[name] = seconds(work, name)
            print(table(found))
            print(json.dumps(times, indent=2), flush=True)


if __name__ == "__main__":
    main()
