"""GPTQ, AWQ and an importance matrix: one `quantize build` against GPTQModel, in one run, on the same tokens.

    python benchmarks/calibrated.py [--checkpoints plain dithered] [--work FOLDER]

For each checkpoint: GPTQModel's GPTQ, GPTQModel's AWQ, our GPTQ alone, and ours for GPTQ + AWQ + imatrix together, each
in a process of its own; then the perplexity of every artifact as transformers loads it from disk. Our time is the whole
command, from start-up through the pass to verified artifacts (minus the verification of the peer's, which it does not
do); `pass_seconds` is the calibration pass with its solves alone. Prints JSON, ratios included.
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

sys.path[0] = str(Path(__file__).resolve().parents[1])  # or benchmarks/gguf.py would stand for the gguf package

HERE = Path(__file__).resolve().parent
RECIPE = """
name: bench
source: {{model: {checkpoint}, name: bench}}
calibration: {{dataset: python-docs, samples: 32, sequence_length: 512}}
variants:
{variants}
"""
GPTQ = "  - {format: gptq, group_size: 64}\n"
ALL = GPTQ + "  - {format: awq, group_size: 64}\n  - {format: gguf, type: Q4_K_M, imatrix: true}\n"


def run(*command: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Standard output's last line of a command that must succeed."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, cwd=cwd)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def peer(checkpoint: Path, method: str, out: Path) -> dict[str, Any]:
    """GPTQModel in a process of its own."""
    command = (str(HERE / "peer_gptqmodel.py"), str(checkpoint.resolve()), method, str(out.resolve()))
    result: dict[str, Any] = json.loads(run(*command, cwd=out.parent))  # it leaves a folder of logs where it runs
    result["perplexity"] = perplexity(out)
    return result


def ours(checkpoint: Path, variants: str, work: Path) -> dict[str, Any]:
    """One build with an empty store; the source's hashes are known, as the peer does not hash."""
    work.mkdir()
    (work / "recipe.yaml").write_text(RECIPE.format(checkpoint=checkpoint, variants=variants))
    env = os.environ | {"QUANTIZE_STORE": str(work / "store"), "QUANTIZE_CACHE": str(work.parent / "cache")}
    import time

    started = time.perf_counter()
    run("-m", "quantize", "build", str(work / "recipe.yaml"), "-q", "--json", "--no-eval", env=env)
    seconds = time.perf_counter() - started
    result: dict[str, Any] = {"seconds": round(seconds, 2), "perplexity": {}}
    for folder in sorted((work / "store" / "bench").iterdir()):
        current = folder / "current"
        measured = json.loads((current / "measurements.json").read_text())
        result["pass_seconds"] = measured["calibration_pass"]["seconds"]
        result["peak_bytes"] = measured["calibration_pass"]["peak_memory_bytes"]
        if (current / "config.json").is_file():
            result["perplexity"][folder.name] = perplexity(current)
    return result


def perplexity(folder: Path) -> float:
    """Held-out perplexity in a process of its own."""
    value: float = json.loads(run(str(HERE / "perplexity.py"), str(folder)))["perplexity"]
    return value


def compare(checkpoint: Path, work: Path) -> dict[str, Any]:
    """All four runs on one checkpoint, and the ratios that matter."""
    theirs = {method: peer(checkpoint, method, work / f"peer-{method}") for method in ("gptq", "awq")}
    alone, together = ours(checkpoint, GPTQ, work / "gptq"), ours(checkpoint, ALL, work / "all")
    mine = together["perplexity"]
    return {
        "full_precision_perplexity": perplexity(checkpoint),
        "gptqmodel": theirs,
        "quantize_gptq": alone,
        "quantize_gptq_awq_imatrix": together,
        "ratios": {
            "gptq_times_faster": round(theirs["gptq"]["seconds"] / alone["seconds"], 2),
            "gptq_pass_times_faster": round(theirs["gptq"]["seconds"] / alone["pass_seconds"], 2),
            "all_times_faster": round((theirs["gptq"]["seconds"] + theirs["awq"]["seconds"]) / together["seconds"], 2),
            "all_pass_times_faster": round(
                (theirs["gptq"]["seconds"] + theirs["awq"]["seconds"]) / together["pass_seconds"], 2
            ),
            "peak_memory": round(together["peak_bytes"] / min(item["peak_bytes"] for item in theirs.values()), 3),
            "gptq_perplexity": round(mine["gptq-int4-g64"] / theirs["gptq"]["perplexity"], 4),
            "awq_perplexity": round(mine["awq-int4-g64"] / theirs["awq"]["perplexity"], 4),
        },
    }


def main() -> None:
    """Run on the demo model, plain and dithered."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", nargs="+", choices=["plain", "dithered"], default=["plain", "dithered"])
    parser.add_argument("--work", type=Path, default=None)
    args = parser.parse_args()
    from benchmarks import models

    with tempfile.TemporaryDirectory() as scratch:
        root = args.work or Path(scratch)
        root.mkdir(parents=True, exist_ok=True)
        plain = root / "plain"
        if not plain.is_dir():
            models.demo(plain)
        for name in args.checkpoints:
            checkpoint = plain if name == "plain" else root / "dithered"
            if not checkpoint.is_dir():
                models.dithered(plain, checkpoint)
            work = root / f"work-{name}"
            work.mkdir()
            print(json.dumps({"checkpoint": name, **compare(checkpoint, work)}, indent=2), flush=True)


if __name__ == "__main__":
    main()
