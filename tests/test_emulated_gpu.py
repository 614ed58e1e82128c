"""The pass and the solvers on an emulated GPU: what is on which device, how often it is asked, what it gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

from benchmarks.blocks import SHAPES
from benchmarks.launches import measure as launches_of
from quantize.build import calibrate, pass_words, size
from quantize.calibration import block_runner
from quantize.calibration.hidden_states import FileStates, HiddenStates, MemoryStates
from quantize.calibration.stream import Block, Spill, open_states, stream_blocks
from quantize.errors import is_out_of_memory
from quantize.events import ListReporter, Reporter
from quantize.formats.base import RunLimits
from quantize.numerics import loops
from quantize.numerics.awq import quantize_scaled
from quantize.numerics.gram import GramAccumulator
from quantize.numerics.scales import ScaleSearch
from quantize.system.cache import hash_file
from quantize.system.gpus import LocalGpu
from quantize.system.process import run_step
from quantize.system.threads import without_gil
from quantize.testing import write_recipe
from tests.architectures import CONFIGS, SavedCheckpoint, save, tiny_model, token_ids
from tests.conftest import Run
from tests.emulated import Ledger, emulated_gpu
from tests.emulated.solving import hold_against_cpu


@pytest.fixture
def llama(tmp_path: Path) -> SavedCheckpoint:
    """A tiny Llama as people have it: in 16 bits."""
    return save(tiny_model("LlamaForCausalLM").bfloat16(), tmp_path / "model")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_whole_pass_and_both_solvers_on_a_gpu(name: str, tmp_path: Path) -> None:
    """tests/test_every_class_on_gpu.py has the other classes."""
    solved = hold_against_cpu(save(tiny_model(name), tmp_path), token_ids())
    assert all(count >= 1 for count in solved.values())


def test_solvers_get_one_piece_of_work_at_a_time_on_a_gpu() -> None:
    assert RunLimits(threads=8).tasks_at_once == 8
    assert RunLimits(threads=8, device="cuda:1").tasks_at_once == 1


def test_linear_algebra_is_loaded_before_the_first_solve(
    llama: SavedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    factorize = torch.linalg.cholesky_ex
    monkeypatch.setattr(
        torch.linalg, "cholesky_ex", lambda matrix: calls.append(matrix.device.type) or factorize(matrix)
    )
    with emulated_gpu():
        block_runner.BlockRunner(llama.config, "cuda", "float32")
    assert calls == ["cuda"]


def test_weights_are_copied_as_they_are_stored_and_converted_on_the_gpu(llama: SavedCheckpoint) -> None:
    stored = sum(llama.read(name).nbytes for name in llama.tensors if ".layers." in name)
    with emulated_gpu() as ledger:
        for block in stream_blocks(llama, token_ids(), device="cuda"):
            assert all(weight.dtype == torch.float32 for weight in block.weights.values())
            del block
    assert ledger.converted <= 4 * 96 * 64, "at most the rows of the embedding that are in use"
    assert ledger.pinned == stored
    assert ledger.to_device < 1.5 * stored


def test_gram_matrices_take_tf32_and_nothing_else_does(llama: SavedCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment has turned on for all."""
    settings, seen = torch.backends.cuda.matmul, []
    add = GramAccumulator.add
    tiles = "quantize.numerics.gram._add_tiles"
    monkeypatch.setattr(tiles, lambda *_: seen.append(settings.fp32_precision))
    settings.fp32_precision = "tf32"
    with emulated_gpu():
        next(iter(stream_blocks(llama, token_ids(), device="cuda")))
        assert settings.fp32_precision == "ieee"
    assert set(seen) == {"tf32"}
    assert add is GramAccumulator.add


def test_small_loops_are_torchscript_on_the_cpu_alone() -> None:
    """On a GPU it fuses operations from the second call on, and the bits change."""
    values, weights = torch.randn(32, 8), torch.rand(32)
    assert isinstance(without_gil(loops.symmetric).__wrapped__, type(lambda: 0))  # type: ignore[attr-defined]
    with emulated_gpu() as ledger:
        ScaleSearch(4, symmetric=False).best(values.to("cuda"), weights.to("cuda"))
        assert any(line.startswith("numerics/loops.py") for line in ledger.launched_by), "Python's own lines launch"
    rows = {line for line in ledger.launched_by if line.startswith("numerics/loops.py")}
    assert len(rows) > 5, "not one script, called from one line"


@pytest.mark.parametrize(("gpu", "memory", "kind", "where"), [
    (None, None, MemoryStates, "cuda"), (0, None, MemoryStates, "cpu"), (0, 0, FileStates, ""),
    (1 << 20, 0, MemoryStates, "cuda"),
])  # fmt: skip
def test_hidden_states_are_on_the_gpu_else_in_memory_else_in_files(
    gpu: int | None, memory: int | None, kind: type[HiddenStates], where: str, llama: SavedCheckpoint, tmp_path: Path
) -> None:
    with emulated_gpu():
        runner = block_runner.BlockRunner(llama.config, "cuda", "float32")
        states = open_states(runner, 100, Spill(tmp_path, memory, gpu_bytes=gpu))
        assert isinstance(states, kind)
        assert not where or states._states.device.type == where  # type: ignore[attr-defined]


@pytest.mark.parametrize(("gpu", "memory"), [(None, None), (0, None), (0, 0)])
def test_where_hidden_states_are_changes_no_bit(
    gpu: int | None, memory: int | None, llama: SavedCheckpoint, tmp_path: Path
) -> None:
    with emulated_gpu():
        expected = _matrices(stream_blocks(llama, token_ids(), device="cuda"))
        found = _matrices(
            stream_blocks(llama, token_ids(), device="cuda", spill=Spill(tmp_path, memory, gpu_bytes=gpu))
        )
    assert all(torch.equal(one, two) for one, two in zip(expected, found, strict=True))


def test_states_beside_the_gpu_are_copied_without_waiting(llama: SavedCheckpoint, tmp_path: Path) -> None:
    """From and to pinned memory; files, which the CPU writes, take one wait for each batch and block."""
    waits, pinned = [], []
    for memory in (None, 0):
        with emulated_gpu() as ledger:
            _matrices(stream_blocks(llama, token_ids(), device="cuda", spill=Spill(tmp_path, memory, gpu_bytes=0)))
            waits.append({line: count for line, count in ledger.synced_by.items() if "hidden_states" in line})
            pinned.append(ledger.pinned)
    assert not waits[0]
    assert sum(waits[1].values()) == 4 + 2 * 3, "sequences at first, then batches"
    assert pinned[1] - pinned[0] == (3 - 1) * pinned_states(llama)


def pinned_states(checkpoint: SavedCheckpoint) -> int:
    """Bytes of the hidden states of all tokens."""
    return 4 * sum(map(len, token_ids())) * int(checkpoint.config["hidden_size"])


def _matrices(blocks: Iterator[Block]) -> Sequence[Tensor]:
    return [block.grams[key].matrix.cpu() for block in blocks for key in sorted(block.grams)]


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
    ],
)
def test_libraries_that_run_out_of_gpu_memory_are_understood(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))


def test_awq_searches_all_groups_at_once_on_a_gpu() -> None:
    """With the scales that the CPU finds one group after the other."""
    torch.manual_seed(0)
    weight, energy = torch.randn(48, 512), torch.rand(512)
    (expected,) = quantize_scaled([weight], energy, torch.ones(512), group_size=32)
    with emulated_gpu() as ledger:
        (found,) = quantize_scaled([weight.to("cuda")], energy.to("cuda"), torch.ones(512).to("cuda"), group_size=32)
        assert (found.codes.cpu() == expected.codes).float().mean() > 0.999
        assert ledger.launches < 600, "of one search, not of sixteen"
        few = ledger.launches
        quantize_scaled([weight.to("cuda")], energy.to("cuda"), torch.ones(512).to("cuda"), group_size=128)
        assert ledger.launches - few < 1.2 * few


def test_a_block_of_4096_channels_is_solved_in_a_tenth_of_the_launches_and_with_kernels_in_a_hundredth() -> None:
    """docs/scale.md has the figures; `before` is counted as the project did it at first."""
    (_, gptq_before, awq_before), (_, gptq_plain, awq_plain), (_, gptq_kernels, awq_kernels) = launches_of(
        SHAPES["8B"], 128
    )
    assert gptq_before[0] > 1_300_000
    assert gptq_plain[0] < 120_000
    assert gptq_kernels[0] < 5_000
    assert awq_before[0] > 90_000
    assert awq_plain[0] < 7_500
    assert awq_kernels[0] < 3_700
    assert max(gptq_plain[1], gptq_kernels[1]) < 20
    assert max(awq_plain[1], awq_kernels[1]) < 175


VARIANTS = [{"format": "gptq", "bits": 4, "group_size": 32}, {"format": "awq", "bits": 4, "group_size": 32}]
CALIBRATION = {"dataset": "python-docs", "samples": 4, "sequence_length": 64}


def in_this_process(name: str, reporter: Reporter, function: Callable[..., Any], *arguments: Any, **_: Any) -> Any:
    """A step that needs the emulated GPU, which other processes don't have."""
    return function(reporter, *arguments)


def asked_in_this_process(name: str, reporter: Reporter, function: Callable[..., Any], *arguments: Any) -> Any:
    """Only the question to the GPU; what else a plan does runs where it always does."""
    where = in_this_process if function is size.ask_gpu else run_step
    return where(name, reporter, function, *arguments)


def build_in_process(run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch, **gpu: Any) -> tuple[list[str], Ledger]:
    """Build with the pass on an emulated GPU; what was said, and the ledger."""
    step = calibrate.run_step
    monkeypatch.setattr(calibrate, "run_step", in_this_process)
    monkeypatch.setattr(size, "run_step", asked_in_this_process)
    with emulated_gpu(**gpu) as ledger:
        result = run("build", recipe, "--device", "cuda", "--no-eval", "--threads", "2")
    monkeypatch.setattr(calibrate, "run_step", step)
    assert result.exit_code == 0, result.stderr
    return result.stderr.splitlines(), ledger


def digests(root: Path) -> list[str]:
    return [hash_file(path) for path in sorted(root.glob("artifacts/*/*/current/model.safetensors"))]


def test_out_of_gpu_memory_the_pass_goes_on_with_its_states_elsewhere(
    tiny: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in no pass here, which is over in less than a minute, a copy of them is written for one that is stopped."""
    saved: list[int] = []
    monkeypatch.setattr(MemoryStates, "save", lambda _: saved.append(1))
    recipe = write_recipe(tmp_path / "demo.yaml", tiny, VARIANTS, calibration=CALIBRATION)
    said, _ = build_in_process(run, recipe, monkeypatch, peak_bytes=12345)
    assert sum("GPTQ and clip searches run in many small steps" in line for line in said) == 1
    for path in tmp_path.glob("artifacts/*/*/current/measurements.json"):
        measured = json.loads(path.read_text())["calibration_pass"]
        assert measured["peak_gpu_memory_bytes"] == measured["peak_gpu_reserved_bytes"] == 12345
        assert measured["kernels"] == "plain"
    expected = digests(tmp_path)
    assert len(expected) == 2
    forward, times = block_runner.BlockRunner.run, iter([True])

    def crowded(self: block_runner.BlockRunner, index: int, states: Tensor) -> Tensor:
        if index == 1 and next(times, False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, index, states)

    monkeypatch.setattr(block_runner.BlockRunner, "run", crowded)
    shutil.rmtree(tmp_path / "artifacts")
    said, _ = build_in_process(run, recipe, monkeypatch)
    assert any("out of the GPU's memory: hidden states move to the computer's" in line for line in said)
    assert digests(tmp_path) == expected
    assert not saved


def test_a_pass_that_does_not_fit_a_gpu_says_so(
    tiny: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "demo.yaml", tiny, VARIANTS, calibration=CALIBRATION)

    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(block_runner.BlockRunner, "run", full)
    with pytest.raises(AssertionError, match=r"(?s)ran out of the GPU's memory.*close what else uses the GPU"):
        build_in_process(run, recipe, monkeypatch)


@pytest.mark.parametrize(("budget", "where"), [((), "in memory"), (("--memory-budget", "1MiB"), None)])
def test_a_plan_says_what_the_pass_takes_of_the_gpu(
    budget: Sequence[str], where: str | None, tiny: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "demo.yaml", tiny, VARIANTS, calibration=CALIBRATION)
    monkeypatch.setattr(size, "run_step", asked_in_this_process)
    with emulated_gpu(vram_bytes=8 << 30):
        data = json.loads(run("plan", recipe, "--device", "cuda", "--json").stdout)["pass_gpu"]
        roomy = run("plan", recipe, "--device", "cuda")
    assert roomy.exit_code == 0, roomy.stderr
    assert "8,192 MiB free" in roomy.stdout
    assert "on the GPU" in roomy.stdout
    hidden = json.loads((tiny / "config.json").read_text())["hidden_size"]
    assert data["state_bytes"] == 4 * 4 * 64 * hidden
    with emulated_gpu(vram_bytes=data["pass_bytes"] + data["state_bytes"] - 1):
        tight = run("plan", recipe, "--device", "cuda", *budget)
    if where is None:
        assert tight.exit_code == 3
        assert "the memory budget is too small" in tight.stderr
    else:
        assert tight.exit_code == 0
        assert where in tight.stdout


def test_a_gpu_that_is_too_small_for_the_pass_is_refused_before_any_work(
    tiny: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "demo.yaml", tiny, VARIANTS, calibration=CALIBRATION)
    monkeypatch.setattr(size, "run_step", asked_in_this_process)
    for command in ("plan", "build"):
        with emulated_gpu(vram_bytes=1 << 20):
            result = run(command, recipe, "--device", "cuda")
        assert result.exit_code == 3, result.stderr
        assert "MiB of the GPU cuda, which has 1 MiB free" in result.stderr
        assert "close what else uses the GPU" in result.stderr
        assert not (tmp_path / "artifacts").exists()


def test_nothing_of_the_emulated_gpu_is_left_behind() -> None:
    """torch keeps the list of functions that make tensors: without its own, models were loaded with rotary frequencies
    that nobody had set.
    """
    _device_constructors.cache_clear()
    with emulated_gpu(), torch.device("meta"):
        assert torch.tensor([1.0]).is_meta
    with torch.device("meta"):
        assert torch.tensor([1.0]).is_meta


def test_a_build_on_the_cpu_says_once_that_a_gpu_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_words, "nvidia_gpus", lambda: (LocalGpu("GeForce", 8 << 30, 0),))
    reporter = ListReporter()
    with emulated_gpu():
        pass_words.say_how(RunLimits(), reporter)
    assert [event.text for event in reporter.events] == [
        "a GPU is there (GeForce), and the pass runs on the CPU: --device cuda is faster"
    ]
    pass_words.say_how(RunLimits(), reporter)
    assert len(reporter.events) == 1, "torch sees none"
