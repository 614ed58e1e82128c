"""Verification is where `--device` says, with GPUs that are only told of: what does not fit goes to the CPU, said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.build import verification
from quantize.build.verification import Verification, verify
from quantize.errors import VerifyError
from quantize.events import ListReporter, Reporter, SilentReporter
from quantize.formats.base import RunLimits
from quantize.formats.bitsandbytes.steps import check_loaded
from quantize.model.checkpoint import Checkpoint, open_checkpoint
from quantize.runtimes.devices import Accelerator, DevicePlace
from quantize.runtimes.llama_cpp.kind import LlamaCpp
from quantize.runtimes.transformers.kind import Transformers
from quantize.runtimes.transformers.load import load_causal_lm
from quantize.system.sizes import GIB
from tests.conftest import Built, Run
from tests.emulated import emulated_gpu, put_on_gpu

CARD = Accelerator("cuda:0", "RTX 4060", 8 * GIB, 7 * GIB)
BUSY = replace(CARD, free_bytes=GIB // 64)
OUT = VerifyError("q8_0.gguf: llama.cpp makes no context for it: CUDA error: out of memory")


class Asked:
    """A builder that remembers where it was told to verify, and fails so often."""

    def __init__(self, *errors: VerifyError) -> None:
        self.places: list[DevicePlace] = []
        self._errors = list(errors)

    def verify(self, folder: Path, checkpoint: Checkpoint, limits: RunLimits, reporter: Reporter) -> Mapping[str, Any]:
        self.places.append(limits.place)
        assert limits.device == limits.place.device
        if self._errors:
            raise self._errors.pop(0)
        return {"runtime": "none"}


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have both runtimes see these GPUs, and be asked in this process."""

    def have(*gpus: Accelerator) -> None:
        monkeypatch.setattr(Transformers, "find_gpus", lambda _: gpus)
        monkeypatch.setattr(LlamaCpp, "find_gpus", lambda _: gpus)
        monkeypatch.setattr(verification, "run_step", lambda _name, reporter, step, *given: step(reporter, *given))

    return have


def verified(built: Built, tiny: Path, builder: Any, device: str) -> tuple[dict[str, Any], list[str]]:
    artifact, reporter = built.store.find("tiny/q8_0"), ListReporter()
    asked = Verification("gguf", builder, artifact.folder, open_checkpoint(tiny))
    facts = verify(asked, RunLimits(device=device), reporter)
    return facts, [event.text for event in reporter.events if event.kind == "warning"]


def test_it_is_on_the_gpu_that_was_asked_for(built: Built, tiny: Path, cards: Callable[..., None]) -> None:
    cards(CARD)
    builder = Asked()
    assert verified(built, tiny, builder, "cuda:0") == ({"runtime": "none", "device": "cuda:0"}, [])
    assert verified(built, tiny, builder, "auto") == ({"runtime": "none", "device": "cuda:0"}, [])
    assert verified(built, tiny, builder, "cpu") == ({"runtime": "none"}, [])
    assert [place.device for place in builder.places] == ["cuda:0", "cuda:0", "cpu"]


def test_what_does_not_fit_is_verified_on_the_cpu_and_said(
    built: Built, tiny: Path, cards: Callable[..., None]
) -> None:
    cards(BUSY)
    builder = Asked()
    facts, (said,) = verified(built, tiny, builder, "cuda:0")
    assert (facts, builder.places) == ({"runtime": "none"}, [DevicePlace()])
    assert said.startswith("the gguf model is run on the CPU: it takes ")
    cards()
    _, (said,) = verified(built, tiny, builder, "cuda:0")
    assert "llama.cpp has no cuda:0 here" in said


def test_a_place_in_part_reaches_the_builder(
    built: Built, tiny: Path, cards: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards(CARD)
    place, builder = DevicePlace("cuda:0", 3), Asked()
    monkeypatch.setattr(verification, "find_place", lambda *_: place)
    verified(built, tiny, builder, "cuda:0")
    assert builder.places == [place]


def test_a_gpu_that_runs_out_of_memory_says_nothing_against_the_artifact(
    built: Built, tiny: Path, cards: Callable[..., None]
) -> None:
    cards(CARD)
    builder = Asked(OUT)
    facts, (said,) = verified(built, tiny, builder, "cuda:0")
    assert [place.device for place in builder.places] == ["cuda:0", "cpu"]
    assert (facts, "verified on the CPU: cuda:0 is out of memory" in said) == ({"runtime": "none"}, True)
    with pytest.raises(VerifyError, match="damaged"):
        verified(built, tiny, Asked(VerifyError("a tensor is damaged")), "cuda:0")


def test_bitsandbytes_is_loaded_and_asked_on_the_gpu(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")  # which looks for GPUs when it is imported
    asked: list[str] = []

    model = load_causal_lm(tiny, dtype=torch.float32)
    model.set_attn_implementation("eager")

    def load(_folder: Path, device: str) -> Any:
        asked.append(device)
        return put_on_gpu(model)

    monkeypatch.setattr("quantize.runtimes.transformers.load.load_causal_lm", load)
    with emulated_gpu() as ledger:
        facts = check_loaded(SilentReporter(), tiny, 1, open_checkpoint(tiny), "cuda:0")
        assert ledger.launches > 100
    assert (asked, len(facts["tokens"])) == (["cuda:0"], 16)


def test_the_command_takes_a_device(built: Built, run: Run) -> None:
    """None of them is here, and no name of one is refused as such."""
    found = run("verify", "tiny/q8_0", "--device", "vulkan:0", "--store", built.store.root)
    assert found.exit_code == 0, found.stderr
    assert "llama.cpp has no vulkan:0 here (GPUs: none)" in found.stderr
    assert run("verify", "tiny/q8_0", "--device", "tpu", "--store", built.store.root).exit_code == 2
