"""How often a GPU is asked for something to solve one block: kernel launches, and waits of the host.

    python -m benchmarks.launches [135M 8B]

Counted on the emulated device (tests/emulated), which runs the project's own solvers on random values and counts. What
a solve launches does not depend on how many output rows it has, only on how many pieces they are in, and GPTQ's sweep
launches as much for each group after the first: so a few rows and groups are solved here, and what a group adds is
multiplied by the groups and pieces of the real shape. `before` is what the project did at first: pieces of 1,024 rows,
AWQ's groups one after the other, a candidate of the clip search after the other; `plain` is now without Triton,
`kernels` with it, each kernel counted as a launch.
Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).parent.parent)

from benchmarks.blocks import SHAPES, Shape
from quantize.numerics import awq, gptq, kernels, loops, scales
from quantize.numerics.constants import GPU_SOLVED_VALUES, SOLVED_ROWS
from quantize.numerics.gram import Gram
from tests.emulated import Ledger, emulated_gpu
from tests.emulated.device import OnDevice

ROWS = 16  # of each linear here
GROUP = 128


def pieces(rows: int, width: int, most_rows: int | None) -> int:
    """How many pieces so many rows are solved in; most_rows None: as a GPU does now."""
    return -(-rows // (most_rows or max(SOLVED_ROWS, GPU_SOLVED_VALUES // width)))


def counted(ledger: Ledger, before: tuple[int, int]) -> tuple[int, int]:
    """Launches and syncs since."""
    return ledger.launches - before[0], ledger.syncs - before[1]


def now(ledger: Ledger) -> tuple[int, int]:
    """Launches and syncs so far."""
    return ledger.launches, ledger.syncs


def solve_gptq(ledger: Ledger, shape: Shape, group: int, most_rows: int | None) -> tuple[int, int]:
    """All inputs of a block."""
    launches = syncs = 0
    found = [gptq_once(ledger, group * groups, group) for groups in (2, 3)]
    factor, two, three = found[0][0], found[0][1], found[1][1]
    for width, rows in shape.inputs:
        times, more = pieces(rows, width, most_rows), width // group - 2
        launches += factor[0] + times * (two[0] + more * (three[0] - two[0]))
        syncs += factor[1] + times * (two[1] + more * (three[1] - two[1]))
    return launches, syncs


def gptq_once(ledger: Ledger, width: int, group: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of a factorization, and of one piece."""
    gram, weight = torch.eye(width).to("cuda"), torch.randn(ROWS, width).to("cuda")
    start = now(ledger)
    factor = gptq.factorize(gram, group)
    once = counted(ledger, start)
    start = now(ledger)
    gptq.solve([weight], factor, bits=4)
    return once, counted(ledger, start)


def solve_awq(ledger: Ledger, shape: Shape, group: int, *, one_by_one: bool) -> tuple[int, int]:
    """The ratio search of each input, and the clip search; one_by_one: for each group of channels."""
    launches = syncs = 0
    for width, rows in shape.inputs:
        few = 4 * group  # a search of all channels launches as much for few as for many
        matrix, weight = torch.eye(few).to("cuda"), torch.randn(ROWS, few).to("cuda")
        start = now(ledger)
        choice = awq.search_scales([awq.Reader(weight, Gram(matrix, width))], group_size=group)
        searched = counted(ledger, start)
        start = now(ledger)
        if one_by_one:
            search, part = scales.ScaleSearch(4, symmetric=False), weight[:, :group].T.contiguous()
            search.best(part, choice.scales[:group])
            each, times = counted(ledger, start), width // group
        else:
            awq.quantize_scaled([weight], matrix.diagonal(), choice.scales, group_size=group)
            each, times = counted(ledger, start), -(-rows * width // scales.GPU_SEARCHED_VALUES)
        launches, syncs = launches + searched[0] + times * each[0], syncs + searched[1] + times * each[1]
    return launches, syncs


@contextmanager
def stand_ins(ledger: Ledger) -> Iterator[None]:
    """Kernels that compute by the plain path and count as one launch."""

    def on_host(function: Any) -> Any:
        def run(*arguments: Any) -> Any:
            ledger.launch()
            given = [item.host if isinstance(item, OnDevice) else item for item in arguments]
            made = function(*given)
            return tuple(map(OnDevice, made)) if isinstance(made, tuple) else made if made is None else OnDevice(made)

        return run

    found = kernels.Kernels("counted", on_host(loops.round_block), on_host(loops.symmetric), on_host(loops.asymmetric))
    with mock.patch.object(kernels, "settled", return_value=(found, None)):
        yield


def measure(shape: Shape, group: int) -> list[tuple[str, tuple[int, int], tuple[int, int]]]:
    """(way, GPTQ's launches and syncs, AWQ's) of a block."""
    found = []
    at_first = kernels.Kernels("before", loops.round_block, loops.symmetric, loops.asymmetric)
    with emulated_gpu() as ledger:
        with mock.patch.object(kernels, "settled", return_value=(None, "counted without")):
            with mock.patch.object(kernels, "WITHOUT_TRITON", at_first):
                found.append(
                    ("before", solve_gptq(ledger, shape, group, SOLVED_ROWS),
                     solve_awq(ledger, shape, group, one_by_one=True))
                )  # fmt: skip
            found.append(
                ("plain", solve_gptq(ledger, shape, group, None), solve_awq(ledger, shape, group, one_by_one=False))
            )
        with stand_ins(ledger):
            found.append(
                ("kernels", solve_gptq(ledger, shape, group, None), solve_awq(ledger, shape, group, one_by_one=False))
            )
    return found


def table(names: Sequence[str]) -> str:
    """Markdown."""
    lines = ["| a block of | way | GPTQ launches | syncs | AWQ launches | syncs |", "|---|---|" + "---:|" * 4]
    for name in names:
        group = 64 if SHAPES[name].hidden % GROUP else GROUP
        for way, for_gptq, for_awq in measure(SHAPES[name], group):
            cells = " | ".join(f"{number:,}" for number in (*for_gptq, *for_awq))
            lines.append(f"| {name}, groups of {group} | {way} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shapes", nargs="*", default=["135M", "8B"], help=", ".join(SHAPES))
    print(table(parser.parse_args().shapes))


if __name__ == "__main__":
    main()
