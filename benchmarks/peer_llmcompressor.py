"""The peer: llm-compressor quantizes a checkpoint with token ids that it is given. Run by benchmarks/compressed.py, in
an environment of its own: it does not import this project.

    python benchmarks/peer_llmcompressor.py CHECKPOINT SCHEME TOKENS.json OUT

GPTQModifier for W4A16 and W8A8, QuantizationModifier for FP8, with their defaults; groups of 64 for W4A16. Prints one
JSON line.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

GROUP = 64


def recipe_for(scheme: str) -> Any:
    """What llm-compressor's own examples use for the scheme."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    if scheme.startswith(("FP8", "NVFP4", "MXFP4")):
        return QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
    if scheme == "W4A16":
        weights = QuantizationArgs(num_bits=4, strategy="group", group_size=GROUP, symmetric=True)
        groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
        return GPTQModifier(config_groups=groups, ignore=["lm_head"])
    return GPTQModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])


def run(checkpoint: Path, scheme: str, tokens: Path, out: Path) -> dict[str, Any]:
    """Quantize and save; seconds of loading, quantizing and saving, and the peak of resident memory."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = json.loads(tokens.read_text())
    data = Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows])
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    longest = max(map(len, rows))
    oneshot(
        model=model, tokenizer=tokenizer, dataset=data, recipe=recipe_for(scheme), max_seq_length=longest,
        num_calibration_samples=len(rows), output_dir=str(out),
    )  # fmt: skip
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "tokens": sum(map(len, rows)),
    }


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
