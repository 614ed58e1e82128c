"""Steps of a module that loads torch: what a worker's environment was when it did, and what MKL made of it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

FOUND_AT_IMPORT = os.environ.get("MKL_CBWR")

import torch  # noqa: E402 - after a look at what it finds

from quantize.events import Reporter  # noqa: E402
from quantize.numerics.gram import GramAccumulator  # noqa: E402
from quantize.system.processor import device_name  # noqa: E402

STRICT = 0x10000  # MKL_CBWR_STRICT of mkl_types.h; below it the branch: 1 none asked for, 2 the processor's own
BRANCHES = {1: None, 2: "AUTO", 3: "COMPATIBLE", 10: "AVX2", 12: "AVX512", 14: "AVX512_E1"}


def modes(reporter: Reporter) -> tuple[str | None, str | None, bool, str]:
    """MKL_CBWR as torch found it; the branch that MKL itself says it runs in, and whether strictly; the kind's name."""
    torch.ones(8, 8) @ torch.ones(8, 8)
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    mode = library.mkl_serv_cbwr_get(-1)
    return FOUND_AT_IMPORT, BRANCHES[mode & ~STRICT], bool(mode & STRICT), device_name("cpu")


def products(reporter: Reporter | None, threads: int) -> bytes:
    """The bits of a Gram matrix and of a linear, in shapes whose sums MKL splits among threads if it may."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(128, 192, generator=generator), torch.randn(256, 192, generator=generator)
    accumulator = GramAccumulator(192)
    accumulator.add(x)
    return b"".join(item.numpy().tobytes() for item in (accumulator.finish().matrix, x @ weight.T))
