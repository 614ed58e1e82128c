"""Pieces of tensor work on threads: order, errors, and the same bits whatever the number of threads."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from quantize.numerics import loops
from quantize.numerics.gptq import collect, factorize, row_tasks
from quantize.system.threads import on_threads, without_gil


def test_results_come_in_the_order_of_the_tasks() -> None:
    first_may_end = threading.Event()

    def first() -> str:
        assert first_may_end.wait(10)
        return "first"

    def second() -> str:
        first_may_end.set()
        return "second"

    assert on_threads([first, second], 2) == ["first", "second"]


@pytest.mark.parametrize("threads", [1, 3])
def test_each_task_has_one_thread_and_the_setting_comes_back(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert on_threads([torch.get_num_threads] * 4, threads) == [1] * 4
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_comes_out_and_the_setting_comes_back(threads: int) -> None:
    before = torch.get_num_threads()

    def fail() -> None:
        raise ZeroDivisionError("inside")

    with pytest.raises(ZeroDivisionError, match="inside"):
        on_threads([lambda: None, fail], threads)
    assert torch.get_num_threads() == before


def test_no_tasks_give_no_results() -> None:
    assert on_threads([], 2) == []


def test_a_solver_gives_the_same_bits_on_any_number_of_threads() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(600, 192)
    weights = [torch.randn(1500, 192), torch.randn(700, 192)]
    found = []
    for threads in (1, 2, 4):
        factor = on_threads([partial(factorize, inputs.T @ inputs, 64)], threads)[0]
        tasks = row_tasks(weights, factor, bits=4)
        assert len(tasks) == 3
        found.append(collect(weights, on_threads(tasks, threads)))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one.quantized.codes, two.quantized.codes)
            assert torch.equal(one.quantized.scales, two.quantized.scales)
            assert one.loss == two.loss


@pytest.mark.parametrize("symmetric", [True, False])
def test_loops_without_the_lock_are_scripts_and_give_the_same_bits(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.randn(64, 33, generator=generator), torch.rand(64, generator=generator)
    function, rest = (loops.symmetric, ([0.9, 0.8],)) if symmetric else (loops.asymmetric, (0.0, [1.0, 0.8]))
    scripted = without_gil(function)
    assert scripted is not function, "it could be scripted"
    for _ in range(3):  # the first runs are profiled, later ones optimized
        found, plain = scripted(values, weights, 4, *rest), function(values, weights, 4, *rest)
        assert torch.equal(*(one if symmetric else torch.cat(one) for one in (found, plain)))
