"""What each format costs a model whose weights lie on no quantization grid: the demo recipe on the dithered demo model.

    python benchmarks/formats.py [--checkpoint FOLDER] [--work FOLDER]

The demo's own source was a Q4_1 file, and its grid flatters some 4- and 5-bit formats and hurts others; the dithered
copy (benchmarks/models.py) is off it. Builds all variants of recipes/smollm2-135m.yaml from that copy, each measured in
its own runtime, without golden prompts and with gates that refuse nothing, and prints a Markdown table, the least
divergence first: size, bits a weight, perplexity over the source's, KL divergence. With --work everything is kept
there, and a second run builds nothing. docs/make_results.py puts the table into the documents.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

RECIPE = ROOT / "recipes" / "smollm2-135m.yaml"
NAME = "dithered"
REFUSE_NOTHING = {"max_kl": 100, "max_perplexity_ratio": 1e6, "max_size_ratio": 100}


def recipe_for(checkpoint: Path, path: Path) -> Path:
    """Write the demo's recipe with another source."""
    import yaml

    data = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    data["name"] = NAME
    data["source"]["model"] = str(checkpoint.resolve())
    data["calibration"] = yaml.safe_load((ROOT / "calibration" / "python-docs.yaml").read_text(encoding="utf-8"))
    data["evaluation"] = {"text": "python-docs", "golden": []}  # what the published figures were measured on
    data["gates"] = REFUSE_NOTHING
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


def dithered_demo(work: Path) -> Path:
    """The dithered demo model in a folder of `work`, made if it is not there."""
    from benchmarks import models

    plain, checkpoint = work / "plain", work / "SmolLM2-135M-Instruct-dithered"
    work.mkdir(parents=True, exist_ok=True)
    if not plain.is_dir():
        models.demo(plain)
    if not checkpoint.is_dir():
        models.dithered(plain, checkpoint)
    return checkpoint


def build(work: Path, checkpoint: Path | None) -> Path:
    """Build and measure every variant, of the dithered copy if no checkpoint is given; returns the store's folder."""
    work.mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        checkpoint = dithered_demo(work)
    environment = os.environ | {"QUANTIZE_STORE": str(work / "store"), "QUANTIZE_CACHE": str(work / "cache")}
    recipe = recipe_for(checkpoint, work / f"{NAME}.yaml")
    command = [sys.executable, "-m", "quantize", "build", str(recipe)]
    if subprocess.run(command, env=environment, cwd=ROOT, stdout=sys.stderr, check=False).returncode:
        raise SystemExit(f"the build of {recipe} failed")
    return work / "store"


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="another one than the dithered demo model")
    parser.add_argument("--work", type=Path, help="folder for checkpoints, cache and store, kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        store = build((arguments.work or Path(scratch)).resolve(), arguments.checkpoint)

        from benchmarks.results import formats_table, read
        from quantize.store.store import Store

        print(formats_table(read(Store(store), NAME)))


if __name__ == "__main__":
    main()
