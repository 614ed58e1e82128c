"""The Triton kernels give the plain path's codes, under its interpreter; where there is none, the plain path runs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from quantize.numerics import few_launches, kernels, loops
from quantize.numerics.scales import SYMMETRIC_GRID, ScaleSearch
from tests.emulated import emulated_gpu

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

COMPARED = """
import torch
from quantize.numerics import loops, scales
from quantize.numerics.triton_kernels import KERNELS
from quantize.numerics.kernels import _differences

assert _differences(KERNELS, torch.device("cpu")) == ""
torch.manual_seed({seed})
size, count = {size}, {count}
values = torch.randn(size, count) * torch.rand(count)
values[:, 0] = 0
values[:, 1] = values[:, 1].abs()
own = torch.rand(size, count)
for weights in (own[:, 0].contiguous(), own):
    for bits in (2, 4, 8):
        arguments = values, weights, bits, [*scales.SYMMETRIC_GRID]
        assert torch.equal(KERNELS.symmetric(*arguments), loops.symmetric(*arguments)), bits
        for least in (0.0, 1.0):
            arguments = values, weights, bits, least, [*scales.ASYMMETRIC_GRID]
            for one, two in zip(KERNELS.asymmetric(*arguments), loops.asymmetric(*arguments), strict=True):
                assert torch.equal(one, two), (bits, least)
feedback = torch.triu(torch.randn(size, size) / 8, 1)
low = torch.randint(-12, -4, (count,)).float()
found = []
steps, exact = torch.randn(size, count) * 5, torch.randn(size, count) * 5
for round_block in (KERNELS.round_block, loops.round_block):
    rounded, errors = steps.clone(), torch.empty(size, count)
    round_block(rounded, exact, errors, feedback, low, low + 15)
    found.append((rounded, errors))
assert torch.equal(found[0][0], found[1][0])
assert torch.equal(found[0][1], found[1][1])
"""


@needs_triton
@pytest.mark.parametrize(("size", "count", "seed"), [(64, 70, 0), (16, 33, 1), (48, 32, 2), (128, 5, 3)])
def test_kernels_give_the_codes_of_the_plain_path(size: int, count: int, seed: int) -> None:
    code = COMPARED.format(size=size, count=count, seed=seed)
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"},
        timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from quantize.numerics import scales, triton_kernels as kernels

grid = tuple(scales.ASYMMETRIC_GRID)
constants = {"GRID": grid, "SHARES": grid, "SIZE": 128, "TILE": kernels.TILE}
for kernel in (kernels._symmetric_kernel, kernels._asymmetric_kernel, kernels._round_kernel):
    given = {name: constants[name] for name in kernel.arg_names if name in constants}
    pointers = {"values", "weights", "scales", "zeros", "steps", "exact", "errors", "feedback", "low", "high"}
    numbers = {"half", "reach_share", "top", "smallest"}
    signature = {
        name: "constexpr" if name in given else "*fp32" if name in pointers else "fp32" if name in numbers else "i32"
        for name in kernel.arg_names
    }
    for architecture in (75, 80, 90):
        source = ASTSource(kernel, signature, constexprs=given)
        made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=kernels._EXACT)
        assert made.asm["cubin"]
        assert "fma.rn.f32" not in made.asm["ptx"], "products are not fused with sums, as in the plain path"
        assert "div.full" not in made.asm["ptx"], "divisions are those of IEEE"
"""


@needs_triton
def test_kernels_compile_for_the_cards_that_people_have() -> None:
    """With the compiler that the wheel brings; no card is needed."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=env, timeout=500)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("most_tried", [few_launches.TRIED_VALUES, 5000], ids=["at once", "in parts"])
@pytest.mark.parametrize(("size", "count", "seed"), [(64, 70, 0), (48, 32, 2), (128, 5, 3)])
def test_few_launches_give_the_codes_of_many(
    size: int, count: int, seed: int, most_tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All candidates at once; errors from what is known before the first column. Near ties may fall the other way."""
    monkeypatch.setattr(few_launches, "TRIED_VALUES", most_tried)
    torch.manual_seed(seed)
    values = torch.randn(size, count) * torch.rand(count)
    values[:, 0], values[:, 1] = 0, values[:, 1].abs()
    own = torch.rand(size, count)
    for weights in (own[:, 0].contiguous(), own):
        for bits in (2, 3, 4, 8):
            arguments = values, weights, bits, [*SYMMETRIC_GRID]
            assert torch.equal(few_launches.symmetric(*arguments), loops.symmetric(*arguments)), bits
    feedback = torch.triu(torch.randn(size, size) / 8, 1) + torch.eye(size)
    low = torch.randint(-12, -4, (count,)).float()
    steps, exact = torch.randn(size, count) * 5, torch.randn(size, count) * 5
    found = []
    for round_block in (few_launches.round_block, loops.round_block):
        rounded, errors = steps.clone(), torch.full((size, count), torch.nan)
        round_block(rounded, exact, errors, feedback, low, low + 15)
        found.append((rounded, errors))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_the_plain_path_is_the_reference_and_needs_no_kernel() -> None:
    assert kernels.kernels_for(torch.ones(2)) is None
    assert kernels.trouble(torch.device("cpu")) is None
    assert kernels.kernels_name(torch.device("cpu")) == "plain"


def test_a_gpu_that_can_not_run_a_kernel_runs_the_plain_path_and_says_so() -> None:
    kernels.settled.cache_clear()
    torch.manual_seed(0)
    values, weights = torch.randn(32, 8), torch.rand(32)
    expected, _ = ScaleSearch(4, symmetric=True).best(values, weights)
    with emulated_gpu():
        found, _ = ScaleSearch(4, symmetric=True).best(values.to("cuda"), weights.to("cuda"))
        torch.testing.assert_close(found.cpu(), expected)
        assert "Triton" in str(kernels.trouble(torch.device("cuda:0"))) or "triton" in str(
            kernels.trouble(torch.device("cuda:0"))
        )
    kernels.settled.cache_clear()
