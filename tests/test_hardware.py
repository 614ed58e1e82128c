"""Cards by the names people write, sizes, this machine, and what fits."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from quantize.errors import UsageError
from quantize.estimate.cards import _CARDS_GIB, GraphicsCard, card_of, find_card
from quantize.estimate.fit import Workload, advise, judge, usable_bytes
from quantize.estimate.vram import IN_LLAMA_CPP, EstimateSettings, ModelShape, VramProfile, estimate
from quantize.events import Reporter, SilentReporter
from quantize.system import machine as hardware
from quantize.system.gpus import Gpus, nvidia_gpus
from quantize.system.machine import detect
from quantize.system.process import run_step
from quantize.system.sizes import GIB, memory_text, parse_size, size_text

LLAMA_8B = ModelShape.from_config(
    {
        "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
    }
)  # fmt: skip


@pytest.mark.parametrize(
    ("written", "name", "gib"),
    [
        ("RTX 4060 8GB", "RTX 4060", 8),
        ("rtx4060ti 16 GB", "RTX 4060 Ti 16GB", 16),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", "RTX 4070 Laptop", 8),
        ("rtx 4070 mobile", "RTX 4070 Laptop", 8),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB", 80),
        ("A100", "A100", 40),
        ("NVIDIA H100 80GB HBM3", "H100", 80),
        ("T4", "Tesla T4", 16),
    ],
)
def test_cards_are_found_as_people_write_them(written: str, name: str, gib: int) -> None:
    assert find_card(written) == GraphicsCard(name, gib * GIB)


@pytest.mark.parametrize("name", [*_CARDS_GIB])
def test_every_card_finds_itself(name: str) -> None:
    assert find_card(name).name == name


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("RTX 4065", "did you mean RTX 4060"),
        ("RTX 4060 9GB", "has 8 GB, not 9 GB"),
        ("a toaster", "--vram 8GiB"),
    ],
)
def test_a_miss_says_what_to_write(written: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_card(written)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * GIB),
        ("8G", 8 * GIB),
        ("7.5 GB", 7_500_000_000),
        ("800 MiB", 800 * 2**20),
        ("42", 42),
        ("1.5k", 1536),
        ("1e9", 10**9),
        ("7b", 7),
        ("2TiB", 2**41),
        ("2t", 2**41),
        ("500 MB", 500_000_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "eight", "8 TB of it", "-1GiB", "GiB", "1XB", "1 GB GB", "nan", "inf", "1e99", "0", "0.5"]
)
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (45_600_000, "45.6 MB"),
        (104_931_424, "104.9 MB"),
        (1_234_000_000, "1.23 GB"),
        (10**16, "10000.00 TB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert size_text(size) == text


def test_memory_for_people_is_binary() -> None:
    assert memory_text(15 * GIB // 2) == "7.50 GiB"


def test_options_become_a_card() -> None:
    assert card_of() is None
    assert card_of(gpu="L4") == GraphicsCard("L4", 24 * GIB)
    assert card_of(vram="8GiB") == GraphicsCard("8GiB", 8 * GIB, known=False)
    assert card_of(gpu="L4", vram="12GiB") == GraphicsCard("L4 (12GiB)", 12 * GIB, known=False)
    with pytest.raises(UsageError, match="'0' is no size"):
        card_of(vram="0")


def test_this_machine() -> None:
    machine = detect()
    assert machine.cores >= 1
    assert 0 < machine.available_ram_bytes <= machine.ram_bytes


def test_a_cgroup_limits_memory_and_cores(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("4294967296\n")
    (tmp_path / "memory.current").write_text("1073741824\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert hardware._cgroup_memory(tmp_path) == (4 * GIB, GIB)
    assert 1 <= hardware.usable_cores(tmp_path) <= 2
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware._cgroup_memory(tmp_path) == (None, 0)


class FakeDriver:
    """NVML with two cards, of which the second does not tell its memory, as on WSL2 and Jetson."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken

    def nvmlInit(self) -> None:  # noqa: N802 - the driver's names
        if self.broken:
            raise self.NVMLError("driver not loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{handle}a-b"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        if uuid != "MIG-a":
            raise self.NVMLError("not found")
        return 5

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return "NVIDIA GeForce RTX 4060"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        if handle == 1:
            raise self.NVMLError("not supported")
        if handle == 5:
            return SimpleNamespace(total=4096 * 2**20, used=0)
        return SimpleNamespace(total=8188 * 2**20, used=512 * 2**20)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:  # noqa: N802
        if handle == 1:
            raise self.NVMLError("not supported")
        return [SimpleNamespace(pid=7, usedGpuMemory=2**20), SimpleNamespace(pid=8, usedGpuMemory=None)]


def test_gpus_are_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeDriver())
    gpu, shared = nvidia_gpus()
    assert (gpu.name, gpu.vram_bytes, gpu.used_bytes) == ("NVIDIA GeForce RTX 4060", 8188 * 2**20, 512 * 2**20)
    assert (shared.vram_bytes, shared.used_bytes) == (0, 0), "it is there, and is cuda:1"
    machine = detect()
    assert machine.gpus[1].vram_bytes == machine.ram_bytes, "it shares the machine's memory"
    assert Gpus().used({7}) == (2**20, 512 * 2**20)
    assert Gpus().used({8}) == (None, 512 * 2**20)


@pytest.mark.parametrize(
    ("visible", "sizes"),
    [
        ("1", [0]), ("1,0", [0, 8188]), ("", []), ("-1", []), ("0,7,1", [8188]),
        ("GPU-1", [0]), ("GPU-", []), ("MIG-a", [4096]), ("MIG-b", []),
    ],
)  # fmt: skip
def test_cards_are_numbered_as_cuda_shows_them(monkeypatch: pytest.MonkeyPatch, visible: str, sizes: list[int]) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeDriver())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.vram_bytes // 2**20 for gpu in nvidia_gpus()] == sizes


def test_processes_of_ours_number_cards_by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    assert run_step("looking", SilentReporter(), order_of_cards) == "PCI_BUS_ID"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    assert run_step("looking", SilentReporter(), order_of_cards) == "FASTEST_FIRST", "what the user has set stands"


def order_of_cards(reporter: Reporter) -> str | None:
    return os.environ.get("CUDA_DEVICE_ORDER")


def test_a_driver_that_fails_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeDriver(broken=True))
    assert nvidia_gpus() == ()


def test_resident_memory_is_that_of_a_living_process() -> None:
    assert hardware.resident_bytes() > 2**20
    assert hardware.resident_bytes(2**22 + 1) == 0


def test_seven_and_a_half_of_eight_is_not_enough() -> None:
    cell = estimate(LLAMA_8B, 7_000_000_000, context=2048)
    assert cell.expected_bytes < 7.5 * GIB
    assert judge(cell, 8 * GIB).word == "does not fit"
    assert usable_bytes(8 * GIB) < 7.5 * GIB


def test_the_three_words() -> None:
    words = [judge(estimate(LLAMA_8B, 4_920_000_000, context=4096), size * GIB // 10).word for size in (80, 66, 60)]
    assert words == ["fits", "tight", "does not fit"]


def test_suggestions_are_true() -> None:
    work = Workload(LLAMA_8B, 4_920_000_000, IN_LLAMA_CPP, EstimateSettings(), context=16384, concurrency=4)
    verdict = advise(work, 8 * GIB, {"Q2_K": (3_180_000_000, IN_LLAMA_CPP), "Q8_0": (8_500_000_000, IN_LLAMA_CPP)})
    assert verdict.word == "does not fit"
    assert verdict.suggestions[0] == "context 2048"
    assert "KV cache at q8_0, and context 4096" in verdict.suggestions
    smaller = Workload(
        LLAMA_8B, 4_920_000_000, IN_LLAMA_CPP, EstimateSettings(kv_type="q8_0"), context=4096, concurrency=4
    )
    assert judge(smaller.estimate(), 8 * GIB).word == "fits"


def test_a_smaller_variant_is_suggested() -> None:
    work = Workload(LLAMA_8B, 8_500_000_000, IN_LLAMA_CPP, EstimateSettings(), context=4096, concurrency=1)
    verdict = advise(work, 8 * GIB, {"Q4_K_M": (4_920_000_000, IN_LLAMA_CPP), "Q5_K_M": (7_000_000_000, IN_LLAMA_CPP)})
    assert verdict.suggestions[0] == "variant Q4_K_M (4.58 GiB)"


def test_what_cannot_be_helped_says_so() -> None:
    work = Workload(LLAMA_8B, 16_000_000_000, VramProfile(), EstimateSettings(runtime="transformers"), 4096, 1)
    (only,) = advise(work, 8 * GIB).suggestions
    assert "no change" in only
    assert "14.90 GiB of it weights" in only


def test_what_fits_needs_no_suggestion() -> None:
    assert advise(Workload(LLAMA_8B, 10**9, IN_LLAMA_CPP, EstimateSettings(), 2048, 1), 24 * GIB).suggestions == ()
