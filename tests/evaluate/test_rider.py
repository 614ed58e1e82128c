"""The source's held-out text beside the calibration pass: the same bits as read on its own, weights read once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quantize.build.execution import RunOptions
from quantize.calibration.hidden_states import HiddenStates, SavedStates
from quantize.calibration.stream import Spill, stream_blocks
from quantize.evaluate import baseline, rider
from quantize.evaluate.engine import STREAMED, STREAMED_ON_CPU
from quantize.evaluate.job import Ride
from quantize.evaluate.rider import Rider
from quantize.evaluate.source_side import RIDDEN_KIND
from quantize.evaluate.streamed import StreamedRuntime
from quantize.events import ListReporter, SilentReporter
from quantize.formats import option_models
from quantize.model.checkpoint import Checkpoint, open_checkpoint
from quantize.recipe.model import load_recipe
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.testing import TinyModel, make_checkpoint, write_recipe
from tests.conftest import build

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and its plugins warn on import
QUIET = SilentReporter()
BLOCKS = 3
WINDOWS = tuple(tuple(range(first, first + length)) for first, length in ((3, 65), (40, 51), (90, 65), (7, 2)))
CALIBRATION = [list(range(start, start + 32)) for start in range(5, 60, 9)]


class Counted:
    """A checkpoint that counts how often each tensor is read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self.reads = checkpoint, Counter[str]()
        self.folder, self.config = checkpoint.folder, checkpoint.config
        self.tensors: Mapping[str, Any] = checkpoint.tensors

    def read(self, name: str) -> Tensor:
        self.reads[name] += 1
        return self._checkpoint.read(name)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_checkpoint(tmp_path_factory.mktemp("source") / "deep", TinyModel(blocks=BLOCKS)))


@pytest.fixture(scope="module")
def alone(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the source gives where nothing else reads it."""
    return rows(source, tmp_path_factory.mktemp("alone"), None)


def rows(source: Checkpoint | Counted, scratch: Path, ridden: Path | None) -> list[Any]:
    with closing(StreamedRuntime(source, "source", STREAMED_ON_CPU, QUIET, scratch, ridden=ridden)) as runtime:
        return [np.concatenate([block.numpy() for block in blocks]) for blocks in runtime.read(WINDOWS)]


def same(ours: list[Any], theirs: list[Any]) -> bool:
    return all(np.array_equal(*pair) for pair in zip(ours, theirs, strict=True))


class Ridden:
    """Passes over the source, each with a Rider of its own in the same folders."""

    def __init__(self, source: Checkpoint, root: Path) -> None:
        self.source, self.root, self.said = Counted(source), root, ListReporter()
        self.ride = Ride(WINDOWS, "a" * 64, root / "cache")
        self.saved: SavedStates | None = None

    def run(self, start: int, stop: int = BLOCKS, *, rides: bool = True) -> list[dict[str, Any]]:
        """Blocks from one to before another; the Gram matrices of each."""
        folder = self.root / "pass"
        folder.mkdir(exist_ok=True)
        spill = Spill(folder, None, self.saved, self._keep)
        found = stream_blocks(
            self.source, CALIBRATION, precision="bfloat16", spill=spill, start_block=start,
            passenger=Rider(self.ride, self.source, folder, self.said) if rides else None,
        )  # fmt: skip
        return [{key: gram.matrix for key, gram in block.grams.items()} for block in self._until(found, stop)]

    def _keep(self, states: HiddenStates) -> None:
        self.saved = states.save()

    @staticmethod
    def _until(blocks: Iterator[Any], stop: int) -> Iterator[Any]:
        for block in blocks:
            yield block
            if block.index + 1 == stop:
                return

    @property
    def entry(self) -> Path:
        return Cache(self.ride.cache).entry(RIDDEN_KIND, self.ride.key)


@pytest.fixture
def ridden(source: Checkpoint, tmp_path: Path) -> Ridden:
    return Ridden(source, tmp_path)


def test_one_reading_of_each_block_serves_both_and_changes_neither(
    ridden: Ridden, source: Checkpoint, alone: list[Any], tmp_path: Path
) -> None:
    """The pass computes in bfloat16, the evaluation in float32."""
    grams = ridden.run(0)
    assert {ridden.source.reads[name] for name in source.tensors if ".layers." in name} == {1}
    assert not (tmp_path / "pass" / "evaluation").exists()
    on_its_own = Counted(source)
    assert same(rows(on_its_own, tmp_path, ridden.entry), alone)
    assert {name for name in on_its_own.reads if ".layers." in name} == set(), "only the head is left to run"
    expected = Ridden(source, tmp_path / "without")
    expected.root.mkdir()
    for ours, theirs in zip(grams, expected.run(0, rides=False), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("case", ["level", "ahead", "behind", "damaged"])
def test_a_ride_goes_on_with_the_pass(ridden: Ridden, alone: list[Any], tmp_path: Path, case: str) -> None:
    for block in range(BLOCKS - 1):
        ridden.run(block, block + 1, rides=case != "behind" or block == 0)
    states = [*(tmp_path / "pass" / "evaluation").glob("hidden.*")]
    assert len(states) == 1, "one block's states, and what they are"
    if case == "ahead":
        ridden.saved = None  # the pass's own states are gone
    elif case == "damaged":
        states[0].write_bytes(states[0].read_bytes()[:-4] + b"bad!")
    before = ridden.source.reads.copy()
    ridden.run(BLOCKS - 1)
    assert same(rows(ridden.source, tmp_path, ridden.entry), alone)
    assert ridden.said.events == []
    again = {name for name in before if ".layers.0." in name and ridden.source.reads[name] > before[name]}
    assert bool(again) == (case in ("ahead", "damaged")), "what a stopped ride has done is not done again"


def test_what_goes_wrong_ends_the_ride_alone(
    ridden: Ridden, alone: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rider, "write_durable", full)
    assert len(ridden.run(0)) == BLOCKS
    (event,) = ridden.said.events
    assert event.text.startswith("the held-out text leaves the calibration pass, and is read after it: ")
    assert not ridden.entry.exists()
    assert not (tmp_path / "pass" / "evaluation").exists()
    (tmp_path / "empty").mkdir()
    assert same(rows(ridden.source, tmp_path, tmp_path / "empty"), alone)


def test_a_build_measures_what_an_evaluation_on_its_own_measures(source: Checkpoint, tmp_path: Path) -> None:
    """The demo of it: streamed, calibrated, and the same baseline, digest and figures as in two steps."""
    text = [f"Paragraph {index}: the quick brown fox jumps over the lazy dog. " * 3 for index in range(12)]
    (tmp_path / "text.txt").write_text("\n\n".join(text))
    calibration = {"dataset": "text.txt", "samples": 8, "sequence_length": 64, "minimum_tokens": 16}
    measured = {"text": "python-docs", "window": 64, "windows": 3, "golden": [], "engine": "streamed"}
    variants = [{"format": "gptq", "group_size": 64}, {"format": "bitsandbytes", "types": ["nf4"]}]
    gates = {"max_kl": 100, "max_perplexity_ratio": 1e6, "max_size_ratio": 100}
    path = write_recipe(
        tmp_path / "ride.yaml", source.folder, variants, calibration=calibration, evaluation=measured, gates=gates
    )
    recipe, found = load_recipe(path, option_models()), []
    for name in ("in one", "in two"):
        said = ListReporter()
        workspace = Workspace(Store(tmp_path / name / "artifacts"), Cache(tmp_path / name / "cache"), said)
        if name == "in two":
            build(recipe, workspace, RunOptions(), evaluate=False)
        outcomes = build(recipe, workspace, RunOptions())
        assert [item.error for item in outcomes] == [None, None]
        rode = "the held-out text goes through the source's blocks beside the calibration text"
        assert (rode in [event.text for event in said.events]) == (name == "in one")
        assert not [*workspace.cache.entry(RIDDEN_KIND, "").glob("[0-9a-f]*")], "used up"
        (kept,) = workspace.cache.entry(baseline.KIND, "").glob("[0-9a-f]*")
        records = [item.artifact.measurements()["evaluation"]["quality"] for item in outcomes if item.artifact]
        digests = [item.artifact.manifest.digest for item in outcomes if item.artifact]
        found.append((baseline.load(kept), records, digests, kept.name))
    (ours, *rest), (theirs, *others) = found
    assert ours.runtime == STREAMED
    assert np.array_equal(ours.tokens, theirs.tokens)
    assert np.array_equal(ours.distribution.chosen, theirs.distribution.chosen)
    assert np.array_equal(ours.target_log_probs, theirs.target_log_probs)
    assert rest == others
