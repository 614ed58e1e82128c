"""The script for the first day on a GPU, rehearsed on the emulated one and on a CPU: a line that is bad is seen."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.blocks import Shape
from tests.conftest import Built
from tests.contract_steps import Computed
from tests.emulated import emulated_gpu
from tools import gpu_acceptance, gpu_models
from tools.acceptance_lines import Line, table

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
    assert all(line.holds for line in lines), table(lines)


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


def held(lines: Iterable[Line]) -> dict[str, Line]:
    """Lines by what they are about; each holds, or nothing depends on it."""
    found = [*lines]
    assert all(line.holds is not False for line in found), table(found)
    return {line.name.partition(": ")[2]: line for line in found}


def test_a_format_is_held_against_its_own_weights(built: Built, tiny: Path) -> None:
    artifact = built.store.find("tiny/q8_0")
    lines = held(gpu_models.computed(artifact, tiny, "cpu"))
    assert set(lines) == {"loads", "KL from our weights", "measured and served"}
    assert lines["loads"].measured.startswith("llama.cpp, twice in ")


def test_a_runtime_that_computes_something_else_is_seen(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Computed(0.2, 0.5, (1,), (2,), ("llama.cpp", "llama.cpp"))
    monkeypatch.setattr(gpu_models, "run_step", lambda *_: found)
    lines = [*gpu_models.computed(built.store.find("tiny/q8_0"), built.root, "cpu")]
    assert [line.holds for line in lines] == [True, False, False]


def test_eight_clients_at_once_and_memory(built: Built, tmp_path: Path) -> None:
    lines = held(gpu_models.served(built.store.find("tiny/q8_0"), built.store, tmp_path, "cpu"))
    assert lines["whole answers"].measured == "32 of 32"
    assert lines["memory"].holds


def test_a_model_that_is_killed_comes_back(built: Built, tmp_path: Path) -> None:
    lines = held(gpu_models.killed(built.store.find("tiny/q8_0"), built.store, tmp_path, "cpu"))
    assert {"not ready", "ready again", "answers as before", "memory of the second"} <= set(lines)


def test_a_table_says_what_does_not_hold() -> None:
    text = table([Line("a", "1", "2", False), Line("b", "1")])
    assert "| a | 1 | 2 | DOES NOT HOLD |" in text
