"""A calibration pass on a cluster: the bytes of the pass on one machine, whatever dies meanwhile."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantize.build import calibrate as calibrated
from quantize.build.spread.schedule import SOLVE
from quantize.build.spread.trace import read_trace
from quantize.calibration.spread import PassSpread
from quantize.errors import Stopped
from quantize.events import Event, ListReporter, SilentReporter
from quantize.formats import option_models
from quantize.formats.base import Context, RunLimits
from quantize.model.source import open_source, pin_source
from quantize.recipe.model import load_recipe
from quantize.store.staging import RESUME_NAME
from quantize.system.cache import Cache
from quantize.testing import TinyModel, make_checkpoint, write_recipe
from tests.cluster.conftest import Nodes

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray, transformers and its plugins warn on import

BLOCKS = 4
CALIBRATION = {"dataset": "text.txt", "samples": 264, "sequence_length": 64, "minimum_tokens": 16}
VARIANTS: list[dict[str, Any]] = [
    {"format": "gptq", "group_size": 64},
    {"format": "awq", "group_size": 64},
    {"format": "gguf", "type": "Q4_K_M", "imatrix": True},
]


class Reporter(ListReporter):
    """Does something when a text is said, once."""

    def __init__(self, on: str = "", then: Callable[[str], None] = lambda _: None) -> None:
        super().__init__()
        self.on, self.then, self.fired = on, then, False

    def emit(self, event: Event) -> None:
        super().emit(event)
        said = f"{event.text} {event.done:g}" if event.done is not None else event.text
        if self.on and not self.fired and self.on in said:
            self.fired = True
            self.then("\n".join(item.text for item in self.events))

    @property
    def text(self) -> str:
        return "\n".join(event.text for event in self.events)


class Passes:
    """The pass of a recipe, run in this process."""

    def __init__(self, root: Path) -> None:
        checkpoint = make_checkpoint(root / "deep", TinyModel(hidden=128, intermediate=256, blocks=BLOCKS))
        text = [f"Paragraph {index}: the quick brown fox jumps over the lazy dog. " * 3 for index in range(700)]
        (root / "text.txt").write_text("\n\n".join(text))
        path = write_recipe(root / "deep.yaml", checkpoint, VARIANTS, calibration=CALIBRATION)
        self.recipe, self.cache = load_recipe(path, option_models()), Cache(root / "cache")

    def run(self, root: Path, spread: PassSpread | None = None, said: ListReporter | None = None) -> dict[str, bytes]:
        """What it leaves for each variant."""
        assert self.recipe.calibration is not None
        source = pin_source(self.recipe, self.cache, SilentReporter())
        checkpoint, limits = open_source(source, self.cache, SilentReporter()), RunLimits(1, spread=spread)
        works = []
        for variant in self.recipe.variants:
            folders = [root / variant.name, root / f"{variant.name}.scratch"]
            for folder in (*folders, root / "pass"):
                folder.mkdir(parents=True, exist_ok=True)
            options = (variant.name, variant.options, source, checkpoint, self.cache, *folders, limits)
            works.append((variant.format, Context(*options)))
        arguments = (self.recipe.calibration, self.recipe.path.parent, works, root / "pass")
        result = calibrated._pass(said or ListReporter(), *arguments)
        assert result.errors == {}
        found = (path for name in root.iterdir() if name.name != "pass" for path in name.rglob("*"))
        return {str(path.relative_to(root)): path.read_bytes() for path in found if path.name != RESUME_NAME}


@pytest.fixture(scope="module")
def passes(tmp_path_factory: pytest.TempPathFactory) -> Passes:
    return Passes(tmp_path_factory.mktemp("spread"))


@pytest.fixture(scope="module")
def alone(passes: Passes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return passes.run(tmp_path_factory.mktemp("alone"))


def test_two_nodes_leave_the_bytes_of_one_machine(
    nodes: Nodes, passes: Passes, alone: dict[str, bytes], tmp_path: Path
) -> None:
    nodes.ensure(1)
    for attempt in range(6):  # on a busy machine the second worker may come when the first has done all
        trace, said, work = tmp_path / f"trace-{attempt}.json", Reporter(), tmp_path / f"work-{attempt}"
        spread = PassSpread(nodes.address, workers=2, cores=1, trace=trace, watch=True)
        assert passes.run(work, spread, said) == alone
        spans = read_trace(trace)
        if len({span.worker for span in spans} - {"writer"}) == 2:
            break
    assert len({span.worker for span in spans} - {"writer"}) == 2
    # groups of linears, halves that a fold keeps together, diagonals
    assert sum(span.kind == SOLVE for span in spans) == BLOCKS * (4 + 2 + 1)
    assert "2 workers" in said.text
    assert [*(work / "pass").glob("share-*/*")] == []


def test_a_worker_that_is_killed_costs_what_it_had_in_hand(
    nodes: Nodes, passes: Passes, alone: dict[str, bytes], tmp_path: Path
) -> None:
    nodes.ensure(1)

    def kill(text: str) -> None:
        os.kill(int(re.findall(r"worker \d+ is process (\d+)", text)[0]), signal.SIGKILL)

    said, trace = Reporter("calibration pass, blocks 2", kill), tmp_path / "trace.json"
    assert passes.run(tmp_path / "work", PassSpread(nodes.address, 2, 1, trace=trace), said) == alone
    assert "is gone" in said.text
    spans = [(span.kind, span.name) for span in read_trace(trace)]
    assert len(spans) - len(set(spans)) <= 1  # what was in hand never ended; nothing else was done again


def test_a_node_that_is_killed_costs_at_most_a_block(
    nodes: Nodes, passes: Passes, alone: dict[str, bytes], tmp_path: Path
) -> None:
    nodes.ensure(1)
    said, trace = Reporter("calibration pass, blocks 2", lambda _: nodes.kill() and None), tmp_path / "trace.json"
    assert passes.run(tmp_path / "work", PassSpread(nodes.address, 2, 1, trace=trace), said) == alone
    assert said.fired
    spans = [(span.kind, span.name) for span in read_trace(trace)]
    again = len(spans) - len(set(spans))
    assert again <= len({name for _, name in spans}) / BLOCKS


def test_a_pass_that_was_stopped_goes_on_with_or_without_the_cluster(
    nodes: Nodes, passes: Passes, alone: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([False, True])
    monkeypatch.setattr(calibrated, "stop_asked", lambda _: next(answers, False))
    with pytest.raises(Stopped, match=f"stopped after block 2 of {BLOCKS}"):
        passes.run(tmp_path, PassSpread(nodes.address, 1, 1))
    said = Reporter()
    answers = iter([True])
    with pytest.raises(Stopped, match=f"stopped after block 3 of {BLOCKS}"):
        passes.run(tmp_path, PassSpread(nodes.address, 1, 1), said)
    assert "goes on after block 2" in said.text
    assert "gone" not in said.text
    assert passes.run(tmp_path, None, said) == alone
    assert "goes on after block 3" in said.text
