"""The peer: GPTQModel quantizes a checkpoint with the calibration text that we use. Run by benchmarks/calibrated.py.

    python benchmarks/peer_gptqmodel.py CHECKPOINT gptq|awq OUT [--samples 32 --length 512 --group-size 64]

Its own defaults otherwise; on the CPU it needs two settings to run at all (see the comments). Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer it refuses to start on machines of few cores


def run(checkpoint: Path, method: str, out: Path, samples: int, length: int, group_size: int) -> dict[str, float]:
    """Quantize and save; seconds of loading, quantizing and saving, and the peak of resident memory."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization import FORMAT, METHOD
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

    from quantize.calibration.datasets.python_docs import help_topics

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = [tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in help_topics()[:samples]]
    data = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows]
    settings = {"bits": 4, "group_size": group_size, "device": "cpu", "offload_to_disk": False}
    if method == "gptq":
        config, extra = QuantizeConfig(desc_act=False, **settings), {}
    else:
        config = QuantizeConfig(quant_method=METHOD.AWQ, format=FORMAT.GEMM, **settings)
        extra = {"backend": BACKEND.AWQ_TORCH}  # the other AWQ kernels need CUDA
    MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(checkpoint))]  # imports its code, as our side does
    started = time.perf_counter()
    model = GPTQModel.load(str(checkpoint), config)
    model.quantize(data, batch_size=4, **extra)
    model.save(str(out))
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "tokens": sum(map(len, rows)),
    }


def main() -> None:
    """Run once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("method", choices=["gptq", "awq"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    args = parser.parse_args()
    print(json.dumps(run(args.checkpoint, args.method, args.out, args.samples, args.length, args.group_size)))


if __name__ == "__main__":
    main()
