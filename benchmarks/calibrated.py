"""GPTQ, AWQ and an importance matrix: one `quantize build` against GPTQModel, in one run, on the same tokens.

    python benchmarks/calibrated.py [--checkpoints plain dithered] [--gptq-only] [--work FOLDER]

For each checkpoint: our GPTQ alone, GPTQModel's, and ours once more; GPTQModel's AWQ; and ours for GPTQ + AWQ + imatrix
together, each in a process of its own; then the perplexity of every artifact as transformers loads it from disk. Of
times it gives `seconds` of work alone (load, quantize, save: neither side's imports, tokenizer and text),
`process_seconds` with those (of ours: the calibration pass, which is a process of its own), and of ours
`command_seconds`, the whole command from planning to artifacts verified in their runtimes, which the peer does not do.
Prints JSON, ratios included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder above, for `benchmarks`

HERE = Path(__file__).resolve().parent
RECIPE = """
name: bench
source: {{model: {checkpoint}, name: bench}}
calibration: {{dataset: python-docs, samples: 32, sequence_length: 512}}
variants:
{variants}
"""
TIMES = ("seconds", "process_seconds")
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
    started = time.perf_counter()
    result: dict[str, Any] = json.loads(run(*command, cwd=out.parent))  # it leaves a folder of logs where it runs
    result["process_seconds"] = round(time.perf_counter() - started, 2)
    result["perplexity"] = perplexity(out)
    return result


def ours(checkpoint: Path, variants: str, work: Path) -> dict[str, Any]:
    """One build with an empty store; the source's hashes are known, as the peer does not hash."""
    work.mkdir()
    (work / "recipe.yaml").write_text(RECIPE.format(checkpoint=checkpoint, variants=variants))
    env = os.environ | {"QUANTIZE_STORE": str(work / "store"), "QUANTIZE_CACHE": str(work.parent / "cache")}
    started = time.perf_counter()
    run("-m", "quantize", "build", str(work / "recipe.yaml"), "-q", "--json", "--no-eval", env=env)
    seconds = time.perf_counter() - started
    result: dict[str, Any] = {"command_seconds": round(seconds, 2), "perplexity": {}}
    for folder in sorted((work / "store" / "bench").iterdir()):
        current = folder / "current"
        measured = json.loads((current / "measurements.json").read_text())["calibration_pass"]
        result["process_seconds"] = measured["seconds"]
        result["seconds"] = round(measured["seconds"] - measured["import_seconds"] - measured["text_seconds"], 2)
        result["peak_bytes"] = measured["peak_memory_bytes"]
        if (current / "config.json").is_file():
            result["perplexity"][folder.name] = perplexity(current)
    return result


def perplexity(folder: Path) -> float:
    """Held-out perplexity in a process of its own."""
    value: float = json.loads(run(str(HERE / "perplexity.py"), str(folder)))["perplexity"]
    return value


def gptq_alone(checkpoint: Path, work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Theirs, and ours before and after it: a machine's speed drifts over minutes, and the mean drifts along."""
    before = ours(checkpoint, GPTQ, work / "gptq-before")
    theirs = peer(checkpoint, "gptq", work / "peer-gptq")
    after = ours(checkpoint, GPTQ, work / "gptq-after")
    means = {key: round((before[key] + after[key]) / 2, 2) for key in TIMES}
    runs = {f"{key}_of_runs": [before[key], after[key]] for key in TIMES}
    return theirs, after | means | runs | {"peak_bytes": max(before["peak_bytes"], after["peak_bytes"])}


def compare_gptq(checkpoint: Path, work: Path) -> dict[str, Any]:
    """GPTQ alone, ours and theirs."""
    theirs, alone = gptq_alone(checkpoint, work)
    ratios: dict[str, float] = {key: round(theirs[key] / alone[key], 2) for key in TIMES}
    ratios["peak_memory"] = round(alone["peak_bytes"] / theirs["peak_bytes"], 3)
    ratios["perplexity"] = round(alone["perplexity"]["gptq-int4-g64"] / theirs["perplexity"], 4)
    return {"gptqmodel": theirs, "quantize": alone, "ratios": ratios}


def compare(checkpoint: Path, work: Path) -> dict[str, Any]:
    """All runs on one checkpoint, and the ratios that matter."""
    gptq, alone = gptq_alone(checkpoint, work)
    theirs = {"gptq": gptq, "awq": peer(checkpoint, "awq", work / "peer-awq")}
    together = ours(checkpoint, ALL, work / "all")
    mine = together["perplexity"]
    return {
        "full_precision_perplexity": perplexity(checkpoint),
        "gptqmodel": theirs,
        "quantize_gptq": alone,
        "quantize_gptq_awq_imatrix": together,
        "ratios": {
            **{f"gptq_{key}": round(theirs["gptq"][key] / alone[key], 2) for key in TIMES},
            **{f"all_{key}": round(sum(item[key] for item in theirs.values()) / together[key], 2) for key in TIMES},
            "peak_memory": round(together["peak_bytes"] / min(item["peak_bytes"] for item in theirs.values()), 3),
            "gptq_perplexity": round(mine["gptq-int4-g64"] / theirs["gptq"]["perplexity"], 4),
            "awq_perplexity": round(mine["awq-int4-g64"] / theirs["awq"]["perplexity"], 4),
        },
    }


def main() -> None:
    """Run on the demo model, plain and dithered."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", nargs="+", choices=["plain", "dithered"], default=["plain", "dithered"])
    parser.add_argument("--gptq-only", action="store_true", help="leave out AWQ, on which the peer spends 12 minutes")
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
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            measure = compare_gptq if args.gptq_only else compare
            print(json.dumps({"checkpoint": name, **measure(checkpoint, work)}, indent=2), flush=True)


if __name__ == "__main__":
    main()
