"""Peak memory of calibrated builds: flat in depth, and what a 3B-shaped model takes.

    python benchmarks/memory.py [depth] [3b] [--work FOLDER]

`depth`: GPTQ builds of random Llamas of 2, 8 and 32 equal blocks. `3b`: AWQ and GPTQ from one pass over a random
checkpoint of Llama-3.2-3B's shape (28 blocks, hidden 3072), with a reduced calibration. Weights are random, which
changes no byte of what is allocated. Each figure is the largest resident set of any process of the build; `pass` is
the calibration pass alone, without the check that loads the finished artifact whole in its runtime. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder above, for `benchmarks`

RECIPE = """
name: memory
source: {{model: {checkpoint}, name: memory}}
calibration: {{dataset: python-docs, samples: {samples}, sequence_length: {length}}}
variants:
{variants}
"""
GPTQ = "  - {format: gptq, group_size: 64}\n"
AWQ = "  - {format: awq, group_size: 64}\n"
SMALL = {"hidden": 1024, "intermediate": 2816, "heads": 16, "kv_heads": 8}
LLAMA_3B = {"layers": 28, "hidden": 3072, "intermediate": 8192, "heads": 24, "kv_heads": 8}
MEASURE = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"rc": done.returncode, "seconds": round(time.perf_counter() - started, 1), "peak_bytes": peak}))
"""


def build(checkpoint: Path, variants: str, work: Path, samples: int, length: int) -> dict[str, Any]:
    """One build in processes of its own: seconds, its peak, and that of the pass alone."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    recipe = work / "recipe.yaml"
    recipe.write_text(RECIPE.format(checkpoint=checkpoint, variants=variants, samples=samples, length=length))
    env = os.environ | {"QUANTIZE_STORE": str(work / "store"), "QUANTIZE_CACHE": str(work / "cache")}
    command = [sys.executable, "-c", MEASURE, sys.executable, "-m", "quantize", "build", str(recipe), "--no-eval", "-q"]
    result: dict[str, Any] = json.loads(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout)
    if result.pop("rc"):
        sys.exit("the build failed")
    measured = [json.loads(path.read_text()) for path in work.glob("store/memory/*/current/measurements.json")]
    result["pass_seconds"] = measured[0]["calibration_pass"]["seconds"]
    result["pass_peak_bytes"] = measured[0]["calibration_pass"]["peak_memory_bytes"]
    return result


def depth(tokenizer: Path, work: Path) -> dict[str, Any]:
    """GPTQ of 2, 8 and 32 equal blocks, and the growth of the peak."""
    from benchmarks import models

    found = {}
    for layers in (2, 8, 32):
        checkpoint = models.random_llama(work / f"blocks-{layers}", tokenizer, layers=layers, **SMALL)
        found[layers] = build(checkpoint, GPTQ, work / f"build-{layers}", samples=16, length=512)
        shutil.rmtree(checkpoint)
    growth = {
        key: round(found[32][key] / found[2][key] - 1, 4) for key in ("pass_peak_bytes", "peak_bytes")
    }  # fmt: skip
    return {"blocks": found, "growth_from_2_to_32": growth}


def three_billion(tokenizer: Path, work: Path) -> dict[str, Any]:
    """AWQ and GPTQ of a 3B-shaped model from one pass of 4 x 512 tokens."""
    from benchmarks import models

    checkpoint = work / "3b"
    if not checkpoint.is_dir():
        models.random_llama(checkpoint, tokenizer, **LLAMA_3B)
    result = build(checkpoint, AWQ + GPTQ, work / "build-3b", samples=4, length=512)
    parameters = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) // 2
    return {"parameters": parameters, "calibration": "4 x 512 tokens", **result}


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", choices=["depth", "3b"], default=["depth", "3b"])
    parser.add_argument("--work", type=Path, default=None)
    args = parser.parse_args()
    from benchmarks import models

    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        tokenizer = work / "tokenizer"
        if not tokenizer.is_dir():
            models.demo(tokenizer)
        for what, run in (("depth", depth), ("3b", three_billion)):
            if what in args.what:
                print(json.dumps({what: run(tokenizer, work)}, indent=2), flush=True)


if __name__ == "__main__":
    main()
