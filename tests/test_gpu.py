"""A device that is not there, and on machines with a CUDA device the pass and the solvers on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quantize.calibration.stream import stream_blocks
from quantize.numerics.gptq import factorize, solve
from quantize.testing import write_recipe
from tests.architectures import CONFIGS, save, tiny_model, token_ids
from tests.conftest import Run

VARIANTS = [{"format": "gptq", "bits": 4, "group_size": 32}, {"format": "awq", "bits": 4, "group_size": 32}]
CALIBRATION = {"dataset": "python-docs", "samples": 4, "sequence_length": 64}
MODEL = "LlamaForCausalLM"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta", "cuda:x"])
def test_a_device_that_is_not_there_is_refused_before_any_work(
    device: str, tiny: Path, tmp_path: Path, run: Run
) -> None:
    path = write_recipe(tmp_path / "demo.yaml", tiny, VARIANTS, calibration=CALIBRATION)
    result = run("build", path, "--device", device)
    assert result.exit_code == 2
    assert f"device {device!r}" in result.stderr
    assert "use --device cpu" in result.stderr
    assert not (tmp_path / "artifacts").exists()


def test_the_model_of_these_tests_is_there_before_a_gpu_is() -> None:
    assert MODEL in CONFIGS


@pytest.mark.gpu
@needs_cuda
def test_the_pass_on_the_gpu_finds_what_the_cpu_finds(tmp_path: Path) -> None:
    checkpoint, ids = save(tiny_model(MODEL), tmp_path), token_ids()
    for one, two in zip(stream_blocks(checkpoint, ids), stream_blocks(checkpoint, ids, device="cuda"), strict=True):
        for key, gram in one.grams.items():
            torch.testing.assert_close(two.grams[key].matrix.cpu(), gram.matrix, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@needs_cuda
def test_gptq_on_the_gpu_loses_no_more_than_on_the_cpu() -> None:
    torch.manual_seed(0)
    inputs, weight = torch.randn(512, 256), torch.randn(512, 256)
    losses = []
    for device in ("cpu", "cuda"):
        factor = factorize((inputs.T @ inputs).to(device), 64)
        losses.append(solve([weight.to(device)], factor, bits=4)[0].loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.gpu
@needs_cuda
def test_a_build_on_the_gpu_is_verified_and_repeats(tiny: Path, tmp_path: Path, run: Run) -> None:
    path = write_recipe(tmp_path / "demo.yaml", tiny, VARIANTS, calibration=CALIBRATION)
    digests = []
    for _ in range(2):
        result = run("build", path, "--device", "cuda", "--no-eval", "--force", "--json")
        assert result.exit_code == 0, result.stderr
        digests.append([item["digest"] for item in json.loads(result.stdout)])
    assert digests[0] == digests[1]
