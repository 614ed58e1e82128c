"""How much calibration text can do for AWQ at all: what is lost on held-out text, by the text that was calibrated on.

    python benchmarks/awq_text.py CHECKPOINT [--blocks 1 6 11] [--tokens 4096]

CHECKPOINT: the dithered demo model (`python benchmarks/models.py dithered OUT`), or any other. The Gram matrices of
some blocks are summed over help topics, over the three texts of `starter`, and over the held-out texts themselves. AWQ
chooses its scales and clips by one of them at a time, with and without error feedback; the loss of each matrix,
tr(ΔW G ΔWᵀ), is under the G of a held-out text. `kinds` has each of starter's texts count alike, whatever its
tokens and norms. Prints a Markdown table: geometric means over the matrices, AWQ on help topics being 1. What is
calibrated on the held-out text itself is the most that any text, or weighting of texts, could reach.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

LENGTH, GROUP_SIZE = 256, 64
STARTER, HELD_OUT = ("prose", "code", "vietnamese"), ("prose", "code", "vietnamese")
CALIBRATED = ("help topics", "starter", "starter, kinds", "the held-out text itself")

Losses = dict[tuple[str, str, str], list[float]]
"""(method, calibrated on, held-out text) -> of each input of each block, the loss of all that read it."""


def texts(checkpoint: Path, tokens: int) -> dict[str, list[list[int]]]:
    """Windows of each text, by its name."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    read = {"topics": "\n".join(topics[name] for name in sorted(topics)[:32])}
    read |= {name: (ROOT / "calibration" / f"{name}.txt").read_text(encoding="utf-8") for name in STARTER}
    read |= {f"held-out {name}": (ROOT / "evaluation" / f"{name}.txt").read_text(encoding="utf-8") for name in HELD_OUT}
    found = {}
    for name, text in read.items():
        ids = tokenizer.encode(text).ids[:tokens]
        found[name] = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)]
    return found


def quantized(method: str, weights: Sequence[Any], gram: Any) -> Iterator[Any]:
    """ΔW of each weight that reads an input, float32."""
    from quantize.numerics.awq import Reader, quantize_compensated, quantize_scaled, search_scales

    scales = search_scales([Reader(weight, gram) for weight in weights], group_size=GROUP_SIZE).scales
    scaled = [weight * scales for weight in weights]
    if method == "AWQ":
        found = quantize_scaled(scaled, gram.matrix.diagonal(), scales, group_size=GROUP_SIZE)
    else:
        solved = quantize_compensated(scaled, gram.matrix, scales, group_size=GROUP_SIZE)
        found = [each.quantized for each in solved]
    return (each.dequantize() / scales - weight for each, weight in zip(found, weights, strict=True))


def measure(checkpoint: Path, blocks: Sequence[int], tokens: int) -> Losses:
    """All losses of the blocks."""
    from quantize.calibration.stream import stream_blocks
    from quantize.model.checkpoint import open_checkpoint
    from quantize.numerics.gptq import row_losses

    source, found = open_checkpoint(checkpoint), Losses()
    streams = {name: stream_blocks(source, windows) for name, windows in texts(checkpoint, tokens).items()}
    for index in range(max(blocks) + 1):
        each = {name: next(stream) for name, stream in streams.items()}
        for key, linears in each["topics"].layout.inputs.items() if index in blocks else ():
            weights = [each["topics"].weights[linear.tensor] for linear in linears]
            grams = {name: block.grams[key] for name, block in each.items()}
            parts = [grams[name].matrix for name in STARTER]
            alike = [part / part.diagonal().sum() for part in parts]
            for held in HELD_OUT:
                judge = grams[f"held-out {held}"]
                by = (
                    grams["topics"],
                    replace(judge, matrix=sum(parts)),
                    replace(judge, matrix=sum(alike)),
                    judge,
                )
                for calibrated, gram in zip(CALIBRATED, by, strict=True):
                    for method in ("AWQ", "AWQ, `rounding: gptq`"):
                        lost = sum(float(row_losses(d, judge.matrix).sum()) for d in quantized(method, weights, gram))
                        found.setdefault((method, calibrated, held), []).append(lost)
    return found


def table(found: Losses) -> str:
    """Markdown: geometric means of what is lost, help topics being 1."""
    import numpy as np

    lines = [f"| | held-out text | {' | '.join(CALIBRATED)} |", f"|---|---|{'---:|' * len(CALIBRATED)}"]
    for method in dict.fromkeys(method for method, _, _ in found):
        for held in HELD_OUT:
            first = np.log(found["AWQ", CALIBRATED[0], held])
            ratios = [float(np.exp(np.mean(np.log(found[method, name, held]) - first))) for name in CALIBRATED]
            lines.append(f"| {method} | {held} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 6, 11])
    parser.add_argument("--tokens", type=int, default=4096, help="of each text")
    arguments = parser.parse_args()
    print(table(measure(arguments.checkpoint.resolve(), arguments.blocks, arguments.tokens)))


if __name__ == "__main__":
    main()
