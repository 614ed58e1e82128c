"""Workers of a spread pass on a GPU, emulated: what they hold there, what they give, what they do when it is full."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from quantize.build.spread import passwork
from quantize.build.spread.passwork import PassPlan, PassWorker
from quantize.build.spread.pool import Actor
from quantize.calibration.hidden_states import MemoryStates
from quantize.calibration.stream import stream_blocks
from quantize.errors import BuildError, OutOfMemory
from quantize.formats.base import Context, RunLimits
from quantize.formats.gptq.build import GptqOptions
from quantize.model.checkpoint import Checkpoint, open_checkpoint
from quantize.model.source import PinnedSource
from quantize.system.cache import Cache
from tests.architectures import token_ids
from tests.emulated import emulated_gpu

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"


@pytest.fixture
def llama(tiny: Path) -> Checkpoint:
    return open_checkpoint(tiny)


def plan_of(checkpoint: Checkpoint, folder: Path, device: str = "cuda") -> PassPlan:
    source: Any = MagicMock(spec=PinnedSource)
    context = Context(
        "gptq", GptqOptions(group_size=32), source, checkpoint, Cache(folder / "cache"), folder, folder,
        RunLimits(device=device),
    )  # fmt: skip
    return PassPlan((("gptq", context),), tuple(tuple(ids) for ids in token_ids()), "float32", folder)


def grams_of(worker: PassWorker, shares: int) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Block after block, as the driver asks for them."""
    saved: dict[int, Any] = dict.fromkeys(range(shares))
    for block in range(worker._runner.blocks):
        sums = []
        for share in range(shares):
            saved[share], found = worker.forward(share, block, saved[share], record=True)
            assert found is not None
            sums.append(found)
        yield {key: matrix for key, (matrix, _, _) in worker.complete(block, sums).items()}


@pytest.mark.parametrize("vram_bytes", [8 << 30, 0])
def test_a_worker_s_sums_are_those_of_the_pass_on_one_cpu(
    llama: Checkpoint, tmp_path: Path, vram_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[str] = []
    opened = passwork.open_states

    def watched(*arguments: Any) -> Any:
        states = opened(*arguments)
        assert isinstance(states, MemoryStates)
        held.append(states._states.device.type)
        return states

    monkeypatch.setattr(passwork, "open_states", watched)
    expected = [*stream_blocks(llama, token_ids())]
    with emulated_gpu(vram_bytes=vram_bytes) as ledger:
        worker = PassWorker(plan_of(llama, tmp_path))
        pinned = ledger.pinned
        for block, found in zip(expected, grams_of(worker, len(worker._shares)), strict=True):
            for key, gram in block.grams.items():
                torch.testing.assert_close(torch.from_numpy(found[key]), gram.matrix, rtol=1e-4, atol=1e-4)
        assert ledger.pinned > pinned, "sums are copied through pinned memory"
        del worker
    assert set(held) == {"cuda" if vram_bytes else "cpu"}


def test_out_of_gpu_memory_a_worker_goes_on_with_less_on_it(
    llama: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with emulated_gpu():
        undisturbed = [*grams_of(PassWorker(plan_of(llama, tmp_path / "a")), 1)]
        actor = Actor(MagicMock())
        actor._work = PassWorker(plan_of(llama, tmp_path / "b"))
        record, failures = actor._work._runner.recording, iter([False, True])

        def crowded(*arguments: Any, **options: Any) -> Any:
            if next(failures, False):  # in the second block
                raise torch.OutOfMemoryError(FULL)
            return record(*arguments, **options)

        monkeypatch.setattr(actor._work._runner, "recording", crowded)
        saved = None
        for block, expected in enumerate(undisturbed):
            report, sums = actor.forward(0, block, saved, record=True)
            saved = report.answer
            for key, (matrix, _, _) in actor._work.complete(block, [sums]).items():
                assert np.array_equal(matrix, expected[key]), "where its states are changes no bit"
        assert not actor._work._states_on_gpu
        del actor


def failing(error: Exception, *, on_gpu: bool) -> tuple[Actor, list[str]]:
    """An actor whose work fails each time, and what was asked of it."""
    asked: list[str] = []

    class Work:
        def __init__(self) -> None:
            self.on_gpu = on_gpu

        def solve(self, *_: Any) -> None:
            asked.append("solve")
            raise error

        def make_room(self) -> None:
            asked.append("room")

        def take_events(self) -> list[Any]:
            return []

    actor = Actor(MagicMock())
    actor._work = Work()
    return actor, asked


@pytest.mark.parametrize(
    ("on_gpu", "asked", "message"),
    [
        (True, ["solve", "room", "solve"], "a worker ran out of its GPU's memory: CUDA out of memory"),
        (False, ["solve"], "a worker ran out of memory: CUDA out of memory"),
    ],
)
def test_memory_that_runs_out_is_not_the_variant_s_failure(on_gpu: bool, asked: list[str], message: str) -> None:
    actor, done = failing(torch.OutOfMemoryError(FULL), on_gpu=on_gpu)
    with pytest.raises(OutOfMemory, match=message):
        actor.solve(0, 0, 0, [], [])
    assert done == asked


def test_any_other_failure_is_the_variant_s_own() -> None:
    actor, done = failing(RuntimeError("not positive definite"), on_gpu=True)
    report = actor.solve(0, 0, 0, [], [])
    assert isinstance(report.error, BuildError)
    assert report.error.message == "not positive definite"
    assert done == ["solve"]
