"""What a calibration pass on one GPU takes at best, step by step: computed, not measured.

    python -m benchmarks.roofline

For GPTQ and AWQ (4 bit, groups of 128) of 128 x 2,048 tokens. Operations and bytes are those of the code (the cost
model of quantize/build/spread/cost.py); what a card reaches is an assumption, printed with the table. A step takes the
longest of its operations, its bytes and its launches. Launches are formulas here, for 8B within 5 % of what
benchmarks/launches.py counts on the emulated device on the plain path.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).parent.parent)

from benchmarks.blocks import SHAPES, Shape
from quantize.numerics.constants import GPU_BATCH_TOKENS, GPU_SOLVED_VALUES, SOLVED_ROWS
from quantize.numerics.scales import ASYMMETRIC_GRID, GPU_SEARCHED_VALUES, SYMMETRIC_GRID

TOKENS = 128 * 2048
GROUP = 128
FORWARD_LAUNCHES = 60  # of a block's layer code and its hooks, for each batch
GRAM_LAUNCHES = 22  # tiles of the four Gram matrices, for each batch, at 4,096 and 14,336 columns about 40
LAUNCH_SECONDS = 5e-6
WAIT_SECONDS = 20e-6
COLUMN_SECONDS = 1e-6  # of the kernel of GPTQ's column loop, whose columns wait for one another


@dataclass(frozen=True)
class Card:
    """What a GPU is taken to reach, per second. bf16, tf32, fp32: operations of matrix products. memory, link, disk:
    bytes of its own memory, from the computer, from its disk. elementwise: float32 operations outside of products.
    """

    name: str
    vram_bytes: int
    bf16: float
    tf32: float
    fp32: float
    elementwise: float
    memory: float
    link: float
    disk: float


LAPTOP = Card("8 GB (RTX 4060 laptop)", 8 << 30, 45e12, 22e12, 9e12, 4e12, 0.20e12, 10e9, 1.5e9)
WORKSTATION = Card("24 GB (RTX 4090)", 24 << 30, 130e12, 65e12, 45e12, 25e12, 0.80e12, 20e9, 3e9)
SERVER = Card("141 GB (H200)", 141 << 30, 600e12, 300e12, 50e12, 25e12, 3.6e12, 40e9, 3e9)
CASES = (("1.5B", LAPTOP), ("8B", WORKSTATION), ("8B", SERVER), ("70B", SERVER))


@dataclass(frozen=True)
class Step:
    """One block's. operations over `rate` a second; moved: bytes, over `speed` a second."""

    name: str
    launches: float
    operations: float
    rate: float
    moved: float
    speed: float
    waits: float = 0

    @property
    def seconds(self) -> float:
        """The slowest of the three, and the waits."""
        work = max(self.operations / self.rate, self.moved / self.speed, self.launches * LAUNCH_SECONDS)
        return work + self.waits * WAIT_SECONDS


def steps(shape: Shape, card: Card, *, kernels: bool, states_on_card: bool) -> list[Step]:
    """Of one block; the first is hidden behind the others, which follow one another."""
    cost, batches = shape.cost(TOKENS), -(-TOKENS // GPU_BATCH_TOKENS)
    weights, stored = shape.weights, 2 * shape.weights
    attention = 2 * 2 * TOKENS * 2048 * shape.hidden / 2
    columns = sum(width * -(-rows // max(SOLVED_ROWS, GPU_SOLVED_VALUES // width)) for width, rows in shape.inputs)
    groups = columns / GROUP
    searches = sum(-(-width * rows // GPU_SEARCHED_VALUES) for width, rows in shape.inputs)
    activations = TOKENS * sum(width for width, _ in shape.inputs)
    gram_moved = 4 * activations + 2 * batches * cost.gram_bytes
    ratio_moved = 20 * 20 * 4 * 1024 * shape.hidden * 4  # points, operations, inputs, rows
    symmetric, asymmetric = 2 * len(SYMMETRIC_GRID) + 3, len(ASYMMETRIC_GRID) + 6
    read = 4 * weights
    sweep_reads = sum(4 * rows * width * width / GROUP / 2 for width, rows in shape.inputs)
    states = (
        [] if states_on_card else [Step("hidden states to and from memory", 0, 0, 1, 2 * cost.state_bytes, card.link)]
    )
    return [
        Step("read a block, copy it", 9, 0, 1, stored, min(card.link, card.disk)),
        Step("forward", FORWARD_LAUNCHES * batches, cost.forward + attention, card.bf16, 8 * activations, card.memory),
        Step("Gram matrices, TF32", GRAM_LAUNCHES * batches, cost.gram, card.tf32, gram_moved, card.memory),
        *([] if states_on_card else states),
        Step("GPTQ: factors, products", 30 * groups, cost.gptq_products, card.fp32, sweep_reads, card.memory, 16),
        Step("GPTQ: clip search", groups * (2 if kernels else 64), 4 * symmetric * weights, card.elementwise,
             read * (1 if kernels else 120), card.memory),
        Step("GPTQ: column loop", columns / 64 if kernels else 3 * columns + 12 * groups, 2 * 64 * weights,
             card.elementwise, read * 3 if kernels else read * 70, card.memory,
             columns * COLUMN_SECONDS / WAIT_SECONDS if kernels else 0),
        Step("AWQ: ratio search", 3500, cost.awq_products, card.fp32, ratio_moved, card.memory, 160),
        Step("AWQ: clip search", searches * (2 if kernels else 450), 4 * asymmetric * weights, card.elementwise,
             read * (3 if kernels else 150), card.memory),
        Step("packed tensors to memory", 60, 0, 1, 2 * 0.55 * weights, card.link, 40),
    ]  # fmt: skip


def gpu_bytes(shape: Shape) -> float:
    """What the pass takes of the card without hidden states, as budget.gpu_pass_bytes counts it, roughly for GPTQ."""
    cost = shape.cost(TOKENS)
    widest = max(width for width, _ in shape.inputs)
    rows = 4 * min(GPU_SOLVED_VALUES, max(width * out for width, out in shape.inputs))
    recording = cost.weight_bytes / 2 + 4 * widest * GPU_BATCH_TOKENS * 6
    return cost.weight_bytes + cost.gram_bytes + max(recording, 6 * rows + 3 * 4 * widest * widest)


def table() -> str:
    """Markdown: a table for each case, and one of the totals."""
    lines, totals = [], []
    for name, card in CASES:
        shape = SHAPES[name]
        need, states = gpu_bytes(shape), shape.cost(TOKENS).state_bytes
        on_card = need + states < card.vram_bytes * 0.93
        found = {way: steps(shape, card, kernels=way, states_on_card=on_card) for way in (False, True)}
        lines += ["", f"**{name} on {card.name}**, hidden states {'on the card' if on_card else 'in memory'}", ""]
        lines += [
            "| step, of a block | launches | 10^12 operations | GB | ms plain | ms kernels |",
            "|---|" + "---:|" * 5,
        ]
        for plain, fused in zip(found[False], found[True], strict=True):
            lines.append(
                f"| {plain.name} | {plain.launches:,.0f}"
                + (f" / {fused.launches:,.0f}" if fused.launches != plain.launches else "")
                + f" | {fused.operations / 1e12:.2f} | {fused.moved / 1e9:.1f} | {plain.seconds * 1e3:.0f} "
                f"| {fused.seconds * 1e3:.0f} |"
            )
        seconds = []
        for way in (False, True):
            hidden, *rest = found[way]
            seconds.append(shape.blocks * max(hidden.seconds, sum(step.seconds for step in rest)))
        stored = shape.stored_bytes()
        totals.append(
            f"| {name} on {card.name} | {(need + (states if on_card else 0)) / 1e9:.1f} | {stored / card.disk:.0f} | "
            f"{seconds[0]:.0f} | {seconds[1]:.0f} |"
        )
    head = [
        "| computed | card's memory, GB | reading the weights alone, s | pass, plain, s | pass, kernels, s |",
        "|---|" + "---:|" * 4,
    ]
    return "\n".join([*head, *totals, *lines])


if __name__ == "__main__":
    print(table())
