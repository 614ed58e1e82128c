"""The first day on a GPU: what only a card can say, in parts of at most nine minutes each.

    python -m tools.gpu_acceptance environment | correctness | block [--device cuda]
    python -m tools.gpu_acceptance resume RECIPE [--device cuda | cpu]
    python -m tools.gpu_acceptance formats | serving | kill [--model FOLDER] [--device cuda:0 | cpu]

environment: what the card reaches in products, memory, copies, launches, and whether the kernels run there.
correctness: every architecture's Gram matrices and losses against the CPU's; the first solve of a process; the same
bits twice. block: a pass over two blocks of an 8B model's shape, GPTQ and AWQ, step by step against the roofline at the
rates that `environment` finds, its memory against the estimate, and once more in 8 GB of the card. resume: a build on
the card, killed at each block, against an undisturbed one (tools/kill_pass). formats, serving, kill: see
tools/gpu_models.py; these and resume run on a CPU too. Prints a table, measured and computed, and exits 1 if a line
does not hold. It has been rehearsed on the emulated device and on a CPU only, where a time means nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.blocks import SHAPES, Shape
from benchmarks.roofline import TOKENS, Card, Step, steps
from quantize.calibration.budget import gpu_pass_bytes, state_bytes
from quantize.calibration.stream import Block, Spill, fastest_precision, stream_blocks
from quantize.events import ListReporter
from quantize.formats import builders
from quantize.formats.awq.build import AwqOptions
from quantize.formats.awq.build import solve_block as solve_awq
from quantize.formats.gptq.build import GptqOptions
from quantize.formats.gptq.build import solve_block as solve_gptq
from quantize.model.checkpoint import Checkpoint, open_checkpoint
from quantize.numerics.kernels import kernels_name, trouble
from quantize.system.memory import free_gpu_bytes, give_back_gpu
from quantize.testing import TinyModel, make_checkpoint
from tests.architectures import CONFIGS, save, tiny_model, token_ids
from tools.acceptance_lines import Line, table
from tools.gpu_models import PARTS, run_part

MOST_SECONDS = 9 * 60
SLOWER, FASTER = 3.0, 1 / 3  # than the roofline: outside of it, either the code or the roofline is wrong
SMALL_CARD = 8 << 30
REPEATS = 5


def seconds_of(work: Callable[[], object], device: str, repeats: int = REPEATS) -> float:
    """The fastest of some runs, the device's own work included; the first, which loads and compiles, is not counted."""
    found = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found[1:])


def card_of(device: str, size: int = 8192) -> Card:
    """What a card reaches. size: of the square products."""
    one = torch.randn(size, size).to(device)
    small = one.bfloat16()
    operations = 2 * size**3

    def product(kind: str) -> float:
        torch.backends.cuda.matmul.fp32_precision = kind
        try:
            return operations / seconds_of(lambda: one @ one, device)
        finally:
            torch.backends.cuda.matmul.fp32_precision = "ieee"

    copied = torch.empty_like(one)
    host = torch.empty(size, size).pin_memory()
    return Card(
        torch.cuda.get_device_name(device), free_gpu_bytes(device),
        bf16=operations / seconds_of(lambda: small @ small, device), tf32=product("tf32"), fp32=product("ieee"),
        elementwise=one.numel() * 8 / seconds_of(lambda: [copied.mul_(1.0001) for _ in range(8)], device),
        memory=2 * one.nbytes / seconds_of(lambda: copied.copy_(one), device),
        link=one.nbytes / seconds_of(lambda: copied.copy_(host, non_blocking=True), device), disk=float("inf"),
    )  # fmt: skip


def environment(device: str, size: int = 8192) -> list[Line]:
    """What is there."""
    card, tiny = card_of(device, size), torch.ones(1).to(device)
    launch = seconds_of(lambda: [tiny.add_(1) for _ in range(1000)], device) / 1000
    why = trouble(torch.device(device))
    return [
        Line("card", f"{card.name}, {card.vram_bytes / 1e9:.1f} GB free, torch {torch.__version__}"),
        Line("precision of the pass", fastest_precision(device)),
        *(
            Line(f"products in {name}", f"{getattr(card, name) / 1e12:.1f} TFLOP/s")
            for name in ("bf16", "tf32", "fp32")
        ),
        Line("memory", f"{card.memory / 1e9:.0f} GB/s"),
        Line("pinned memory to card", f"{card.link / 1e9:.1f} GB/s"),
        Line("a launch", f"{launch * 1e6:.1f} us", "5 us", launch < SLOWER * 5e-6),
        Line("kernels", why or kernels_name(torch.device(device)), "triton", why is None),
    ]


def gptq(block: Block, group_size: int = 32) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """Solve a block."""
    return solve_gptq(block, GptqOptions(group_size=group_size), "gptq", ListReporter(), 1)


def awq(block: Block, group_size: int = 32) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """Solve a block."""
    return solve_awq(block, AwqOptions(group_size=group_size), 1)


def correctness(device: str, names: Iterable[str] = CONFIGS) -> list[Line]:
    """The card against the CPU, and against itself. The process's first solve is among it."""
    lines = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, ids = save(tiny_model(name), Path(folder)), token_ids()
            on_cpu = next(iter(stream_blocks(checkpoint, ids)))
            on_card = next(iter(stream_blocks(checkpoint, ids, device=device)))
            away = max(
                float((on_card.grams[key].matrix.cpu() - gram.matrix).abs().max() / gram.matrix.abs().max())
                for key, gram in on_cpu.grams.items()
            )
            lines.append(Line(f"{name}: Gram matrices", f"{away:.1e} away", "< 1e-3 (TF32)", away < 1e-3))
            for way in (gptq, awq):
                expected, (tensors, found), (again, _) = way(on_cpu)[1], way(on_card), way(on_card)
                losses = [found[layer]["loss"] / max(expected[layer]["loss"], 1e-9) for layer in expected]
                same = all(torch.equal(tensors[key].cpu(), again[key].cpu()) for key in tensors)
                what, holds = f"{name}: {way.__name__}", max(losses) < 1.05
                lines.append(Line(f"{what} loss", f"{max(losses):.3f} of the CPU's at most", "< 1.05", holds))
                lines.append(Line(f"{what} twice", "same bits" if same else "other bits", "same bits", same))
            del on_card
    return lines


def block(device: str, shape: Shape = SHAPES["8B"], *, sequences: int = 128, length: int = 2048) -> list[Line]:
    """Two blocks of a shape, with times and memory; once more in as much of the card as a small one has."""
    group = 128 if shape.hidden % 128 == 0 else 32
    with tempfile.TemporaryDirectory() as folder:
        model = TinyModel(shape.hidden, shape.intermediate, 2, shape.heads, shape.kv_heads)
        checkpoint = open_checkpoint(make_checkpoint(Path(folder) / "model", model, dtype="BF16"))
        ids = torch.randint(3, 380, (sequences, length), generator=torch.Generator().manual_seed(0)).tolist()
        estimate = estimated_bytes(checkpoint, sequences * length, group)
        times = timeline(checkpoint, ids, device, group)
        peak = torch.cuda.max_memory_allocated(device)
        lines = [*compared(times, shape, sequences * length, card_of(device, min(8192, shape.hidden * 2)), device)]
        fits = peak <= 1.1 * estimate
        lines.append(Line("memory of the card", f"{peak / 1e9:.2f} GB", f"{estimate / 1e9:.2f} GB at most", fits))
        total = torch.cuda.mem_get_info(device)[1]
        give_back_gpu()
        if total > SMALL_CARD:
            torch.cuda.set_per_process_memory_fraction(SMALL_CARD / total, device)
        try:
            timeline(checkpoint, ids, device, group, Spill(Path(folder), gpu_bytes=0))
            lines.append(Line("in 8 GB of the card", "done", "done", True))
        except torch.OutOfMemoryError as exc:
            lines.append(Line("in 8 GB of the card", str(exc).splitlines()[0], "done", False))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    return lines


def estimated_bytes(checkpoint: Checkpoint, tokens: int, group: int) -> int:
    """What the plan says of the card's memory, hidden states among it."""
    parts = [(builders()["gptq"], GptqOptions(group_size=group)), (builders()["awq"], AwqOptions(group_size=group))]
    return gpu_pass_bytes(checkpoint, parts) + state_bytes(checkpoint.config, tokens)


def timeline(
    checkpoint: Checkpoint, ids: Sequence[Sequence[int]], device: str, group: int, spill: Spill | None = None
) -> dict[str, float]:
    """Seconds of each step of the second block: what the first call loads or compiles is the first's."""
    times, started = dict[str, float](), time.perf_counter()

    def done(step: str) -> None:
        nonlocal started
        torch.cuda.synchronize(device)
        times[step], started = time.perf_counter() - started, time.perf_counter()

    for found in stream_blocks(checkpoint, ids, device=device, precision=fastest_precision(device), spill=spill):
        done("read, forward, Gram matrices")
        gptq(found, group)
        done("GPTQ")
        awq(found, group)
        done("AWQ")
        del found
    return times


def compared(times: dict[str, float], shape: Shape, tokens: int, card: Card, device: str) -> Iterable[Line]:
    """Each step against the roofline at the card's own rates."""
    found = steps(shape, card, kernels=kernels_name(torch.device(device)) != "plain", states_on_card=True)

    def sum_of(*starts: str) -> float:
        chosen: list[Step] = [step for step in found if step.name.startswith(starts)]
        return sum(step.seconds for step in chosen)

    computed = {
        "read, forward, Gram matrices": sum_of("forward", "Gram") * tokens / TOKENS,
        "GPTQ": sum_of("GPTQ"), "AWQ": sum_of("AWQ"),
    }  # fmt: skip
    for step, seconds in times.items():
        ratio = seconds / computed[step]
        yield Line(step, f"{seconds * 1e3:.0f} ms", f"{computed[step] * 1e3:.0f} ms", FASTER < ratio < SLOWER)


def resume(device: str, recipe: Path) -> list[Line]:
    """A build that is killed at each block ends with the bits of one that is not."""
    command = [sys.executable, "-m", "tools.kill_pass", str(recipe), "--blocks", "--random", "2"]
    done = subprocess.run([*command, "--", "--device", device, "--no-eval"], timeout=MOST_SECONDS, check=False)
    return [Line("killed at each block", f"exit {done.returncode}", "exit 0", done.returncode == 0)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=["environment", "correctness", "block", "resume", *PARTS])
    parser.add_argument("recipe", type=Path, nargs="?")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", type=Path, help="a checkpoint for formats, serving, kill; else a small one is made")
    asked = parser.parse_args()
    if not torch.cuda.is_available() and not (asked.device == "cpu" and asked.part in (*PARTS, "resume")):
        sys.exit("torch sees no GPU here")
    if asked.part == "resume":
        if asked.recipe is None:
            parser.error("resume needs a recipe")
        lines = resume(asked.device, asked.recipe)
    elif asked.part in PARTS:
        lines = run_part(asked.part, asked.device, asked.model)
    else:
        lines = {"environment": environment, "correctness": correctness, "block": block}[asked.part](asked.device)
    print(table(lines))
    sys.exit(int(any(line.holds is False for line in lines)))


if __name__ == "__main__":
    main()
