"""Perplexity of a checkpoint or artifact as transformers loads it from disk, on the held-out python-docs topics.

    python benchmarks/perplexity.py FOLDER [--topics 40] [--length 512]

Prints one JSON line. At most --topics are read; CPython 3.11.7 has 9. The protocol: each topic is cut to 3,000
characters and LENGTH tokens and scored on its own; the perplexity is exp of the mean negative log-likelihood over all
predicted tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # gptqmodel refuses to start with fewer


def perplexity(folder: Path, topics: int = 40, length: int = 512) -> tuple[float, int]:
    """(perplexity, predicted tokens)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from quantize.calibration.datasets.python_docs import help_topics

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    quantized = "quantization_config" in json.loads((folder / "config.json").read_text())
    dtype = "auto" if quantized else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, device_map="cpu", dtype=dtype).eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for text in help_topics(held_out=True)[:topics]:
            ids = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")["input_ids"]
            logits = model(input_ids=ids).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    return math.exp(total / count), count


def main() -> None:
    """Measure one folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--topics", type=int, default=40)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    value, tokens = perplexity(args.folder, args.topics, args.length)
    print(json.dumps({"folder": str(args.folder), "perplexity": round(value, 4), "tokens": tokens}))


if __name__ == "__main__":
    main()
