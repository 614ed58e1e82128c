"""Peak memory of merging a LoRA adapter: tensor by tensor, against PEFT's merge_and_unload of the same adapter.

    python benchmarks/adapter.py [--layers N] [--work FOLDER]

A random Llama in FP16 (hidden 2048, intermediate 5632) with a rank-16 adapter on all of its linears. Each side loads,
merges and writes the whole checkpoint in a process of its own; `peak` is its largest resident set, `weights` what of it
are tensors: the peak of a process that only imports the same libraries is taken off. Then the two results are compared,
tensor by tensor. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder above, for `benchmarks`

from benchmarks.models import random_llama  # noqa: E402 - from the folder above
from quantize.testing import make_checkpoint  # noqa: E402 - from the folder above

ADAPTER = """
import sys
import torch, peft
from transformers import AutoModelForCausalLM
base, out = sys.argv[1:]
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.02)
model.save_pretrained(out)
print(0)
"""
END = """
import resource
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
PEFT = (
    """
import sys
import torch, peft
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
if len(sys.argv) > 1:
    base, adapter, out = sys.argv[1:]
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
    model.merge_and_unload().save_pretrained(out)
"""
    + END
)
OURS = (
    """
import sys
from pathlib import Path
import torch
import safetensors
from quantize.events import SilentReporter
from quantize.model.checkpoint import read_model
from quantize.model.mended import write_mended
from quantize.model.mending import find_mending
torch.set_num_threads(1)
if len(sys.argv) > 1:
    base, adapter, out = map(Path, sys.argv[1:])
    out.mkdir()
    write_mended(SilentReporter(), find_mending(base, *read_model(base), adapter=adapter), out)
"""
    + END
)
COMPARED = """
import sys
from pathlib import Path
from quantize.model.checkpoint import open_checkpoint
ours, theirs = (open_checkpoint(Path(path)) for path in sys.argv[1:])
assert set(ours.tensors) == set(theirs.tensors)
worst = 0.0
for name in ours.tensors:
    left, right = ours.read(name).float(), theirs.read(name).float()
    worst = max(worst, float((left - right).abs().max() / right.abs().max()))
print(worst)
"""


def script(text: str, *arguments: Path) -> float:
    """The number that a script prints last, in a process of its own."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", text, *map(str, arguments)], check=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    return float((done.stdout.split() or ["0"])[-1])


def measure(work: Path, layers: int) -> dict[str, Any]:
    """Peaks in bytes, and the largest difference of a tensor as a share of its largest value."""
    base, adapter = work / "base", work / "adapter"
    tokenizer = make_checkpoint(work / "tokenizer")
    random_llama(base, tokenizer, layers=layers, hidden=2048, intermediate=5632, heads=32, kv_heads=8)
    script(ADAPTER, base, adapter)
    found: dict[str, Any] = {"base_bytes": sum(path.stat().st_size for path in base.glob("*.safetensors"))}
    for name, text in (("peft", PEFT), ("ours", OURS)):
        idle, peak = script(text), script(text, base, adapter, work / name)
        found[name] = {"peak": int(peak), "imports": int(idle), "weights": int(peak - idle)}
    for path in base.iterdir():  # the tokenizer and the like, which PEFT's merge does not write
        if path.suffix != ".safetensors" and not (work / "peft" / path.name).exists():
            (work / "peft" / path.name).write_bytes(path.read_bytes())
    found["worst_difference"] = script(COMPARED, work / "ours", work / "peft")
    found["peak_ratio"] = round(found["ours"]["peak"] / found["peft"]["peak"], 3)
    found["weights_ratio"] = round(found["ours"]["weights"] / found["peft"]["weights"], 3)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--work", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        print(json.dumps(measure(Path(work), arguments.layers), indent=2))


if __name__ == "__main__":
    main()
