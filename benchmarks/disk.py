"""Disk that a build takes at its peak: what the plan says, and what is measured, for four recipes of the demo model.

    python benchmarks/disk.py [gguf] [packed] [mixed] [all] [--eval]

`gguf`: three GGUF types. `packed`: GPTQ and AWQ from one pass, hidden states on disk. `mixed`: GGUF with an importance
matrix, and bitsandbytes. `all`: the demo's recipe. Store and cache are alone on a tmpfs, of which every used byte is
counted all the time, those of deleted files that are still open too; it must be allowed to mount one. Prints a line of
JSON for each, and exits 1 where the plan is more than 2 % off. --eval measures what is built, as a user's build does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from tools.small_disk import small_disk  # noqa: E402

TOLERANCE = 0.02
DEMO = ROOT / "recipes" / "smollm2-135m.yaml"
RECIPES: dict[str, list[str]] = {
    "gguf": ["q4_k_m", "q5_k_m", "q8_0"],
    "packed": ["awq-int4-g64", "gptq-int4-g64"],
    "mixed": ["q4_k_m-imatrix", "bnb-int8"],
    "all": [],
}
SPILLED = "780MiB"  # a little more than the pass takes at the least: the hidden states don't fit beside it


def variants(name: str, folder: Path) -> Path:
    """The demo's recipe with some of its variants, beside which its paths still hold."""
    import yaml

    data = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    wanted = RECIPES[name]
    kinds = {
        "q4_k_m": {"format": "gguf", "type": "Q4_K_M"}, "q5_k_m": {"format": "gguf", "type": "Q5_K_M"},
        "q8_0": {"format": "gguf", "type": "Q8_0"}, "awq-int4-g64": {"format": "awq", "group_size": 64},
        "gptq-int4-g64": {"format": "gptq", "group_size": 64}, "bnb-int8": {"format": "bitsandbytes", "type": "int8"},
        "q4_k_m-imatrix": {"format": "gguf", "type": "Q4_K_M", "imatrix": True},
    }  # fmt: skip
    data["variants"] = [kinds[variant] for variant in wanted] if wanted else data["variants"]
    data["calibration"] = yaml.safe_load((ROOT / "calibration" / "python-docs.yaml").read_text(encoding="utf-8"))
    data["evaluation"]["golden"] = [str(ROOT / path) for path in data["evaluation"]["golden"]]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def measure(name: str, folder: Path, *, evaluate: bool) -> dict[str, Any]:
    """Plan and build one recipe on a disk of its own."""
    with small_disk(folder / name, 64 << 30) as disk:
        environment = os.environ | {
            "QUANTIZE_STORE": str(disk.folder / "store"), "QUANTIZE_CACHE": str(disk.folder / "cache"),
        }  # fmt: skip
        recipe = variants(name, folder)
        limits = ["--memory-budget", SPILLED] if name == "packed" else []
        quantize = [sys.executable, "-m", "quantize"]
        planning = [*quantize, "plan", str(recipe), "--json", *limits]
        planned = json.loads(subprocess.run(planning, env=environment, stdout=subprocess.PIPE, check=True).stdout)
        predicted = planned["disk_needed_bytes"] - (0 if evaluate else planned["disk_parts"]["baseline"])
        building = [*quantize, "build", str(recipe), "--quiet", *limits, *([] if evaluate else ["--no-eval"])]
        process, peak = subprocess.Popen(building, env=environment, stdout=subprocess.DEVNULL), 0
        while process.poll() is None:
            peak = max(peak, disk.used_bytes)
            time.sleep(0.001)
        if process.returncode not in (0, 3):
            raise SystemExit(f"{name}: the build failed")
    return {
        "recipe": name, "evaluated": evaluate, "predicted": predicted, "measured": peak,
        "ratio": round(predicted / peak, 4), "parts": planned["disk_parts"],
    }  # fmt: skip


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="*", choices=[*RECIPES], default=[*RECIPES])
    parser.add_argument("--eval", action="store_true", help="measure what is built")
    asked = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.what:
            found.append(measure(name, Path(folder), evaluate=asked.eval))
            print(json.dumps(found[-1]), flush=True)
    return 1 if any(abs(item["ratio"] - 1) > TOLERANCE for item in found) else 0


if __name__ == "__main__":
    sys.exit(main())
