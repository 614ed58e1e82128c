"""compressed-tensors: one `quantize build` a scheme against llm-compressor, in one run, on the same tokens.

    python benchmarks/compressed.py --peer PYTHON [--schemes W4A16 W8A8 FP8_DYNAMIC] [--work FOLDER]

PYTHON: of an environment with llm-compressor (`pip install llmcompressor==0.14.0.1`). On the dithered demo model, 32
help topics of Python cut to 512 tokens: ours, theirs, and ours once more, each in a process of its own; then both
artifacts as transformers loads them, in float32, against the source: perplexity, and the mean KL divergence on held-out
help topics, prose and code. `seconds` are of the work alone (load, quantize, save), without imports and text; FP8 needs
no pass, and the whole command is what is given of ours. Prints JSON, ratios included.
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

CHARACTERS, LENGTH, PIECES = 3000, 512, 8
OPTIONS = {"W4A16": {"group_size": 64}}


def build(work: Path, checkpoint: Path, scheme: str, place: str) -> dict[str, Any]:
    """One build with an empty store."""
    import yaml

    recipe = {
        "name": "bench",
        "source": {"model": str(checkpoint), "name": "bench"},
        "calibration": {"dataset": "python-docs", "samples": 32, "sequence_length": LENGTH},
        "variants": [{"format": "compressed-tensors", "scheme": scheme, **OPTIONS.get(scheme, {})}],
    }
    path = work / f"{scheme}-{place}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    store = work / f"store-{scheme}-{place}"
    env = os.environ | {"QUANTIZE_STORE": str(store), "QUANTIZE_CACHE": str(work / "cache")}
    started = time.perf_counter()
    command = [sys.executable, "-m", "quantize", "build", str(path), "--quiet", "--no-eval"]
    subprocess.run(command, env=env, cwd=ROOT, check=True, stdout=sys.stderr)
    seconds = time.perf_counter() - started
    (folder,) = (item / "current" for item in (store / "bench").iterdir())
    found = json.loads((folder / "measurements.json").read_text()).get("calibration_pass")
    result: dict[str, Any] = {"folder": str(folder.resolve()), "command_seconds": round(seconds, 2)}
    if found is None:
        return result | {"seconds": round(seconds, 2)}
    work_alone = found["seconds"] - found["import_seconds"] - found["text_seconds"]
    return result | {"seconds": round(work_alone, 2), "peak_bytes": found["peak_memory_bytes"]}


def peer(python: str, checkpoint: Path, scheme: str, tokens: Path, out: Path) -> dict[str, Any]:
    """llm-compressor in its own environment."""
    script = ROOT / "benchmarks" / "peer_llmcompressor.py"
    command = [python, str(script), str(checkpoint), scheme, str(tokens), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent)
    if done.returncode:
        raise SystemExit(f"llm-compressor failed:\n{done.stderr[-3000:]}")
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "folder": str(out)}


def texts() -> dict[str, list[str]]:
    """Held-out text by kind."""
    from quantize.calibration.datasets.python_docs import help_topics

    kinds = {"docs": [text[:CHARACTERS] for text in help_topics(held_out=True)]}
    for kind in ("prose", "code"):
        whole = (ROOT / "evaluation" / f"{kind}.txt").read_text(encoding="utf-8")
        kinds[kind] = [whole[at : at + CHARACTERS] for at in range(0, len(whole), CHARACTERS)][:PIECES]
    return kinds


def measure(folders: list[Path], source: Path) -> dict[str, dict[str, float]]:
    """Perplexity, and mean KL divergence from the source, by folder and kind of text; transformers, float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    pieces = {
        kind: [tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt")["input_ids"] for text in each]
        for kind, each in texts().items()
    }

    def read(model: Any, ids: Any) -> Any:
        with torch.inference_mode():
            return torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1)

    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    known = {kind: [read(plain, ids) for ids in each] for kind, each in pieces.items()}
    del plain
    found: dict[str, dict[str, float]] = {}
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        row: dict[str, float] = {}
        for kind, each in pieces.items():
            pairs = [(read(model, ids), base, ids) for ids, base in zip(each, known[kind], strict=True)]
            divergence = torch.cat([(base.exp() * (base - ours)).sum(-1) for ours, base, _ in pairs])
            losses = torch.cat([-ours.gather(1, ids[0, 1:, None])[:, 0] for ours, _, ids in pairs])
            row[f"kl_{kind}"] = round(float(divergence.mean()), 5)
            row[f"perplexity_{kind}"] = round(float(losses.mean().exp()), 4)
        found[str(folder)] = row
    return found


def compare(python: str, checkpoint: Path, scheme: str, tokens: Path, work: Path) -> dict[str, Any]:
    """Ours, theirs, ours: a machine's speed drifts over minutes, and the mean drifts along."""
    before = build(work, checkpoint, scheme, "before")
    theirs = peer(python, checkpoint, scheme, tokens, work / f"peer-{scheme}")
    after = build(work, checkpoint, scheme, "after")
    seconds = (before["seconds"] + after["seconds"]) / 2
    figures = measure([Path(after["folder"]), Path(theirs["folder"])], checkpoint)
    ours, other = figures[after["folder"]], figures[theirs["folder"]]
    ratios = {"speed": round(theirs["seconds"] / seconds, 2)}
    ratios |= {key: round(ours[key] / other[key], 3) for key in ours}
    if "peak_bytes" in after:
        ratios["peak_memory"] = round(after["peak_bytes"] / theirs["peak_bytes"], 3)
    return {"scheme": scheme, "quantize": {**after, **ours, "seconds_of_runs": [before["seconds"], after["seconds"]]},
            "llm_compressor": {**theirs, **other}, "ratios": ratios}  # fmt: skip


def main() -> None:
    """Run on the dithered demo model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", required=True, help="the Python of an environment with llm-compressor")
    parser.add_argument("--schemes", nargs="+", default=["W4A16", "W8A8", "FP8_DYNAMIC"])
    parser.add_argument("--work", type=Path, help="folder for checkpoints and artifacts, kept")
    args = parser.parse_args()
    from benchmarks.formats import dithered_demo
    from quantize.calibration.text import load_calibration_set
    from quantize.recipe.calibration import CalibrationSpec

    with tempfile.TemporaryDirectory() as scratch:
        work = (args.work or Path(scratch)).resolve()
        checkpoint = dithered_demo(work)
        spec = CalibrationSpec(dataset="python-docs", samples=32, sequence_length=LENGTH)
        tokens = work / "tokens.json"
        tokens.write_text(json.dumps([list(row) for row in load_calibration_set(spec, work, checkpoint).token_ids]))
        for scheme in args.schemes:
            print(json.dumps(compare(args.peer, checkpoint, scheme, tokens, work), indent=2), flush=True)


if __name__ == "__main__":
    main()
