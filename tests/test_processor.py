"""The same bits on any number of threads: MKL's mode in every worker, and the kind of processor that is recorded.

Oracles: MKL's own word for its mode, /proc/cpuinfo, and products on one thread. What another maker's processor does
with the mode was seen in an emulator (docs/rebuild.md).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from quantize.build.spread.pool import Actor
from quantize.build.spread.ray_cluster import RayInside
from quantize.events import SilentReporter
from quantize.numerics.gram import GramAccumulator
from quantize.numerics.loops import round_block, symmetric
from quantize.system.process import run_step
from quantize.system.processor import CHOOSERS, MKL_MODE, device_name, name_device, strict_mode
from quantize.system.threads import without_gil
from tests import torch_steps

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="MKL is x86-64's")

ROOT = Path(__file__).parent.parent
AVX2 = "vendor_id\t: GenuineIntel\nflags\t\t: fpu sse2 avx avx2 fma\n\nflags\t\t: fpu\n"
AVX512 = "flags\t\t: fpu avx2 avx512f avx512dq avx512cd avx512bw avx512vl avx512_bf16 amx_tile\n"
KNIGHTS = "flags\t\t: fpu avx2 avx512f avx512cd avx512er avx512pf\n"


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a user who has never heard of it."""
    monkeypatch.delenv(MKL_MODE)


@pytest.mark.parametrize(
    ("cpuinfo", "mode"),
    [(AVX2, "AVX2,STRICT"), (AVX512, "AVX512,STRICT"), (KNIGHTS, "AVX2,STRICT"), (None, "AVX2,STRICT")],
)
def test_the_mode_is_the_best_of_the_processor(cpuinfo: str | None, mode: str, tmp_path: Path) -> None:
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert strict_mode(tmp_path / "cpuinfo") == mode


def test_elsewhere_there_is_no_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert strict_mode() is None


@pytest.mark.usefixtures("unset")
def test_a_worker_has_the_mode_before_torch_loads_and_records_it() -> None:
    """The step's own module loads torch, which happens before the step is called."""
    found, branch, strict, kind = run_step("looking", SilentReporter(), torch_steps.modes)
    assert found == strict_mode()
    assert strict
    own_kernels = "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    assert branch == ("AUTO" if own_kernels else str(found).partition(",")[0])
    assert kind.endswith(f", MKL {found}")
    assert MKL_MODE not in os.environ  # this process is left as it was


def test_what_the_user_has_set_stands_and_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MKL_MODE, "COMPATIBLE")
    found, branch, strict, kind = run_step("looking", SilentReporter(), torch_steps.modes)
    assert (found, branch, strict) == ("COMPATIBLE", "COMPATIBLE", False)
    assert kind.endswith(", MKL COMPATIBLE")


@pytest.mark.usefixtures("unset")
def test_a_worker_of_a_cluster_has_the_mode_too() -> None:
    Actor(RayInside())
    assert os.environ[MKL_MODE] == strict_mode()


@pytest.mark.usefixtures("unset")
def test_products_in_a_worker_have_the_same_bits_on_any_number_of_threads() -> None:
    found = {run_step("multiplying", SilentReporter(), torch_steps.products, threads) for threads in (1, 2, 4)}
    assert len(found) == 1


def test_the_kind_names_what_the_processor_has() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    kind = device_name("cpu")
    assert ("AMX" in kind) == ("amx_tile" in flags)
    assert ("AVX512_BF16" in kind) == ("avx512_bf16" in flags and "amx_tile" not in flags)
    assert kind.startswith("cpu AVX512" if "avx512vl" in flags else "cpu AVX2")
    assert run_step("looking", SilentReporter(), name_device, "cpu") == kind


@pytest.mark.parametrize("name", CHOOSERS)
def test_what_chooses_other_kernels_is_in_the_kind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = device_name("cpu")
    monkeypatch.setenv(name, "SSE41")
    assert device_name("cpu") == f"{before}, {name} SSE41"


def test_atens_own_kernels_are_in_the_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert run_step("looking", SilentReporter(), name_device, "cpu").startswith("cpu DEFAULT")


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-user")
def test_the_same_bits_on_any_number_of_threads_on_an_emulated_intel_processor() -> None:
    """Without the mode this fails on a Haswell, real or emulated. A worker would leave the emulator: none here."""
    program = (
        "from quantize.system.process import settle_libraries; settle_libraries(); "
        "from tests.torch_steps import products; "
        "print(len({products(None, threads) for threads in (1, 2, 4)}))"
    )
    inherited = {name: value for name, value in os.environ.items() if name != MKL_MODE}
    paths = os.pathsep.join([str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))])
    done = subprocess.run(
        ["qemu-x86_64", "-cpu", "Haswell", os.path.realpath(sys.executable), "-c", program],
        capture_output=True, env={**inherited, "PYTHONPATH": paths}, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "1\n", done.stderr[-1000:]


# --- one thread, two, four --------------------------------------------------------------------------------------------


def assert_same_on_threads(function: Callable[[], Tensor]) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(function())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "width", "out"), [(512, 576, 1536), (512, 1536, 576), (512, 2048, 64), (7, 4096, 192)]
)
def test_products_of_the_pass(dtype: torch.dtype, tokens: int, width: int, out: int) -> None:
    """Linears with and without bias, and attention: a batch of tokens, also few outputs of long sums."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, width), (out, width), (out,))
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    heads = x.view(1, tokens, -1, 64).transpose(1, 2)
    assert_same_on_threads(lambda: functional.linear(x, weight))
    assert_same_on_threads(lambda: functional.linear(x, weight, bias))
    assert_same_on_threads(lambda: torch.softmax(heads @ heads.transpose(2, 3), -1) @ heads)
    assert_same_on_threads(lambda: functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True))


def test_loops_in_torchscript() -> None:
    """Gram matrices use all threads; the solvers' loops run on one each, and must not depend on it either."""
    generator = torch.Generator().manual_seed(0)
    rows, steps = torch.randn(512, 1000, generator=generator), 8 * torch.randn(64, 512, generator=generator)
    feedback = torch.randn(64, 64, generator=generator) / 64
    low, high = torch.full((512,), -8.0), torch.full((512,), 7.0)

    def gram() -> Tensor:
        accumulator = GramAccumulator(1000)
        accumulator.add(rows)
        return accumulator.finish().matrix

    def rounded() -> Tensor:
        inside, errors = steps.clone(), torch.empty_like(steps)
        without_gil(round_block)(inside, steps, errors, feedback, low, high)
        return torch.cat((inside, errors))

    assert_same_on_threads(gram)
    assert_same_on_threads(rounded)
    assert_same_on_threads(lambda: without_gil(symmetric)(steps, torch.ones(64), 4, [0.9, 0.8]))
