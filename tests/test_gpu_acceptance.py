"""The script for the first day on a GPU, rehearsed on the emulated one: its steps run, and a bad line ends it badly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.blocks import Shape
from tests.emulated import emulated_gpu
from tools import gpu_acceptance
from tools.gpu_acceptance import Line

SMALL = Shape(128, 256, 2, 4, 2, 384)


def test_the_environment_is_measured() -> None:
    with emulated_gpu():
        lines = {line.name: line for line in gpu_acceptance.environment("cuda", size=64)}
    assert "Emulated GPU" in lines["card"].measured
    assert lines["kernels"].holds is False, "there is no Triton on it"


def test_a_card_is_held_against_the_cpu() -> None:
    with emulated_gpu():
        lines = gpu_acceptance.correctness("cuda", ["Qwen2ForCausalLM"])
    assert len(lines) == 5
    assert all(line.holds for line in lines), gpu_acceptance.table(lines)


def test_a_block_is_timed_and_its_memory_held_against_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    fractions: list[float] = []

    def limit(fraction: float, _device: Any) -> None:
        fractions.append(fraction)

    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limit)
    with emulated_gpu(vram_bytes=32 << 30):
        lines = {line.name: line for line in gpu_acceptance.block("cuda", SMALL, sequences=2, length=32)}
    assert fractions == [0.25, 1.0]
    assert set(lines) == {"read, forward, Gram matrices", "GPTQ", "AWQ", "memory of the card", "in 8 GB of the card"}
    assert lines["in 8 GB of the card"].holds
    assert lines["memory of the card"].holds, "nothing is allocated on it"


def test_a_table_says_what_does_not_hold() -> None:
    text = gpu_acceptance.table([Line("a", "1", "2", False), Line("b", "1")])
    assert "| a | 1 | 2 | DOES NOT HOLD |" in text
