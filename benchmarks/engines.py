"""The two engines that measure one model, beside each other: its real runtime, and transformers' layers block by block.

    python benchmarks/engines.py SOURCE [--artifact FOLDER --format awq] [--windows 3] [--kernel torch_awq:float32 …]

SOURCE: the folder of a checkpoint; without an artifact it is compared itself. A kernel is one of gptqmodel's, with the
type that the rest computes in, for what the real runtime's own choice of both adds. Mean KL divergence in nats over
windows of 512 tokens of python-docs, of the streamed model from the other one. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder above, for `quantize`

Rows = list[Any]


def log_probs(runtime: Any, windows: list[list[int]]) -> Rows:
    """Of each window, float32 [rows, vocabulary]."""
    import numpy as np

    return [np.concatenate([block.cpu().numpy() for block in blocks]) for blocks in runtime.read(windows)]


def by_kernel(model: Any, kernel: str, windows: list[list[int]]) -> tuple[str, Rows]:
    """The classes of its quantized linears, and what it gives. kernel: "name:dtype"."""
    import torch

    from quantize.formats import runtime_kind
    from quantize.runtimes.transformers.load import kernels, load_causal_lm

    name, _, dtype = kernel.partition(":")
    runtime_kind(model.format).import_torch("comparing kernels")
    loaded = load_causal_lm(model.folder, dtype=getattr(torch, dtype), backend=name)
    found = []
    for ids in windows:
        with torch.inference_mode():
            logits = loaded(input_ids=torch.tensor([ids[:-1]])).logits[0].float()
        found.append(torch.log_softmax(logits, -1).numpy())
    return kernels(loaded), found


def apart(real: Rows, streamed: Rows) -> dict[str, float]:
    """Mean and largest KL divergence of predictions, and the share with the same likeliest token."""
    import numpy as np

    ours, theirs = (np.concatenate(rows).astype(np.float64) for rows in (streamed, real))
    kl = (np.exp(theirs) * (theirs - ours)).sum(-1)
    same = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    return {"mean_kl": float(f"{kl.mean():.3g}"), "max_kl": float(f"{kl.max():.3g}"), "same_top": round(same, 4)}


def main() -> None:
    """Compare one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--format", default="safetensors")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--kernel", action="append", default=[])
    args = parser.parse_args()
    from quantize.evaluate.engine import STREAMED_ON_CPU
    from quantize.evaluate.prompts import PromptTokenizer
    from quantize.evaluate.streamed import open_streamed
    from quantize.evaluate.text import cut_windows, load_text
    from quantize.events import SilentReporter
    from quantize.formats import open_runtime
    from quantize.runtimes.base import ModelRef

    model = ModelRef((args.artifact or args.source).resolve(), args.format)
    source = args.source.resolve()
    tokenizer = PromptTokenizer(source)
    text = load_text("python-docs", Path())
    cut = cut_windows(text, tokenizer.encode, prefix=tokenizer.prefix, window=512, limit=args.windows)
    windows = [list(ids) for ids in cut.token_ids]
    with closing(open_streamed(model, source, STREAMED_ON_CPU, SilentReporter(), source)) as runtime:
        streamed = log_probs(runtime, windows)
    with closing(open_runtime(model, context=512)) as real:
        found = {real.version: apart(log_probs(real, windows), streamed)}
    for kernel in args.kernel:
        name, rows = by_kernel(model, kernel, windows)
        found[f"{name}, {kernel.partition(':')[2]}"] = apart(rows, streamed)
    print(json.dumps({"predictions": sum(map(len, streamed)), **found}, indent=2))


if __name__ == "__main__":
    main()
