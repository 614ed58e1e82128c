"""Peak memory of calibrated builds and of evaluation: flat in depth, within what the plan says, and of large models.

    python benchmarks/memory.py [depth] [least] [3b] [evaluate] [--work FOLDER] [--shape NAME]

`depth`: GPTQ builds of random Llamas of 2, 8 and 32 equal blocks. `least`: builds of the demo model and of two wider
random ones with the least memory that their plan allows as the budget, planned and measured. `3b`: AWQ and GPTQ from
one pass over a random checkpoint of Llama-3.2-3B's shape (28 blocks, hidden 3072), with a reduced calibration. Weights
are random, which changes no byte of what is allocated. Each figure is the largest resident set of any process of the
build; `pass` is the calibration pass alone, without the check that loads the finished artifact whole in its runtime.
`evaluate`: random sources of 8 and 32 equal blocks, of Llama-3.2-3B's shape and of Llama-3.1-8B's, and AWQ artifacts of
random codes for them, each read block by block over two windows of 512 tokens, in 24 GB of disk; `--shape` names one.
Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
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
IMATRIX = "  - {format: gguf, types: [Q4_K_M], imatrix: true}\n"
SMALL = {"hidden": 1024, "intermediate": 2816, "heads": 16, "kv_heads": 8}
LLAMA_3B = {"layers": 28, "hidden": 3072, "intermediate": 8192, "heads": 24, "kv_heads": 8}
SHAPES = {
    "8 blocks": {"layers": 8, **SMALL},
    "32 blocks": {"layers": 32, **SMALL},
    "3B": {**LLAMA_3B, "vocabulary": 128256},
    "8B": {
        "layers": 32, "hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8, "vocabulary": 128256,
        "tied": False,
    },
}  # fmt: skip
LEAST = (  # shape (none: the demo model), variants
    (None, GPTQ + AWQ + IMATRIX),
    (None, GPTQ),
    (None, AWQ),
    (None, IMATRIX),
    ({"layers": 2, "hidden": 1024, "intermediate": 4096, "heads": 16, "kv_heads": 8}, GPTQ + AWQ),
    ({"layers": 2, "hidden": 2048, "intermediate": 5632, "heads": 32, "kv_heads": 8}, GPTQ + AWQ),
)
MEASURE = """
import ctypes, json, os, resource, subprocess, sys, time
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what outlives the command is waited for, and counts
started = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"rc": done.returncode, "seconds": round(time.perf_counter() - started, 1), "peak_bytes": peak}))
"""

EVALUATE = """
import sys
from pathlib import Path
from quantize.evaluate.job import EvaluationJob
from quantize.evaluate.kinds import text_parts
from quantize.evaluate.session import evaluate, prepare_source
from quantize.events import SilentReporter
from quantize.recipe.evaluation import Extent
from quantize.runtimes.base import ModelRef
source, artifact, cache = map(Path, sys.argv[2:])
job = EvaluationJob(
    ModelRef(source, "safetensors"), "random", ModelRef(artifact, "awq"), cache,
    text=text_parts("python-docs", Path()), text_name="python-docs", extent=Extent(512, 2, 0, 0),
    device="cpu", engine="streamed",
)
if sys.argv[1] == "source":
    prepare_source(SilentReporter(), job)
else:
    found = evaluate(SilentReporter(), job).quality
    assert found is not None
    assert (found.runtime, found.source_runtime) == ("streamed blocks",) * 2, found
"""


def build(
    checkpoint: Path, variants: str, work: Path, samples: int, length: int, budget: int | None = None
) -> dict[str, Any]:
    """One build in processes of its own: seconds, its peak, and that of the pass alone. budget: bytes for the pass."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    recipe = work / "recipe.yaml"
    recipe.write_text(RECIPE.format(checkpoint=checkpoint, variants=variants, samples=samples, length=length))
    env = os.environ | {"QUANTIZE_STORE": str(work / "store"), "QUANTIZE_CACHE": str(work / "cache")}
    command = [sys.executable, "-c", MEASURE, sys.executable, "-m", "quantize", "build", str(recipe), "--no-eval", "-q"]
    command += ["--memory-budget", str(budget)] if budget else []
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


def least(tokenizer: Path, work: Path) -> list[dict[str, Any]]:
    """Builds with as little memory as their plans allow: planned and measured bytes of the pass."""
    from benchmarks import models
    from quantize.calibration.budget import pass_bytes
    from quantize.formats import builders, option_models
    from quantize.model.checkpoint import open_checkpoint
    from quantize.recipe.model import load_recipe
    from quantize.system.machine import usable_cores

    found = []
    for shape, variants in LEAST:
        checkpoint = tokenizer
        if shape is not None:
            checkpoint = work / f"hidden-{shape['hidden']}"
            models.random_llama(checkpoint, tokenizer, **shape)
        recipe = work / "least.yaml"
        recipe.write_text(RECIPE.format(checkpoint=checkpoint, variants=variants, samples=32, length=512))
        parts = [(builders()[item.format], item.options) for item in load_recipe(recipe, option_models()).variants]
        planned = pass_bytes(open_checkpoint(checkpoint), parts, usable_cores())
        measured = build(checkpoint, variants, work / "build-least", samples=32, length=512, budget=planned)
        names = sorted(path.name for path in (work / "build-least" / "store" / "memory").iterdir() if path.is_dir())
        taken = measured["pass_peak_bytes"]
        found.append({"shape": shape or "demo", "variants": names, "planned_bytes": planned, "measured_bytes": taken,
                      "ratio": round(taken / planned, 3)})  # fmt: skip
    return found


def three_billion(tokenizer: Path, work: Path) -> dict[str, Any]:
    """AWQ and GPTQ of a 3B-shaped model from one pass of 4 x 512 tokens."""
    from benchmarks import models

    checkpoint = work / "3b"
    if not checkpoint.is_dir():
        models.random_llama(checkpoint, tokenizer, **LLAMA_3B)
    result = build(checkpoint, AWQ + GPTQ, work / "build-3b", samples=4, length=512)
    parameters = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) // 2
    return {"parameters": parameters, "calibration": "4 x 512 tokens", **result}


def evaluate(tokenizer: Path, work: Path, names: Sequence[str] = tuple(SHAPES)) -> dict[str, Any]:
    """Source and AWQ artifact of each shape, read block by block in processes of their own."""
    from benchmarks import models

    found: dict[str, Any] = {}
    for name, shape in ((name, SHAPES[name]) for name in names):
        source, artifact = work / "evaluated-source", work / "evaluated-awq"
        models.random_llama(source, tokenizer, **shape)
        models.random_awq(artifact, source)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        found[name] = {"parameters": size // 2}
        for side in ("source", "artifact"):
            paths = [str(path) for path in (source, artifact, work / "evaluated-cache")]
            command = [sys.executable, "-c", MEASURE, sys.executable, "-c", EVALUATE, side, *paths]
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
            result = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
            if result.pop("rc"):
                sys.exit("the evaluation failed")
            found[name][side] = result
            print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)
        for folder in (source, artifact, work / "evaluated-cache"):
            shutil.rmtree(folder)
    if not {"8 blocks", "32 blocks"} <= set(found):
        return {"shapes": found}
    growth = {
        side: round(found["32 blocks"][side]["peak_bytes"] / found["8 blocks"][side]["peak_bytes"] - 1, 4)
        for side in ("source", "artifact")
    }
    return {"shapes": found, "growth_from_8_to_32": growth}


WHAT: dict[str, Callable[..., Any]] = {"depth": depth, "least": least, "3b": three_billion, "evaluate": evaluate}


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", choices=list(WHAT), default=list(WHAT))
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--shape", choices=list(SHAPES), action="append", help="of evaluate; all where none is given")
    args = parser.parse_args()
    from benchmarks import models

    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        tokenizer = work / "tokenizer"
        if not tokenizer.is_dir():
            models.demo(tokenizer)
        for what, run in WHAT.items():
            if what in args.what:
                chosen = {"names": args.shape} if what == "evaluate" and args.shape else {}
                print(json.dumps({what: run(tokenizer, work, **chosen)}, indent=2), flush=True)


if __name__ == "__main__":
    main()
