"""Builds that are stopped and go on: shards, the record of the pass, Ctrl-C and kill -9 of the real command.

The judge is always a build that nobody stopped: the same bytes, or the same digests. kill_pass.py does it at every
block and as often as one likes, on any recipe.
"""

from __future__ import annotations

import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.build import calibrate as calibrated
from quantize.errors import Stopped
from quantize.events import ListReporter, SilentReporter
from quantize.files.shards import ShardWriter
from quantize.formats import option_models
from quantize.formats.base import Context, RunLimits
from quantize.model.source import open_source, pin_source
from quantize.recipe.model import load_recipe
from quantize.store.staging import RESUME_NAME, read_json
from quantize.system.cache import Cache
from quantize.testing import TinyModel, make_checkpoint, write_recipe
from tools.kill_build import leftovers_of
from tools.kill_pass import Builds, at_blocks, stopped_again_and_again

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and its plugins warn on import

TABLE = {f"t{index}": ("F32", (index + 1, 7)) for index in range(8)}
CALIBRATION = {"dataset": "text.txt", "samples": 8, "sequence_length": 64, "minimum_tokens": 16}
BLOCKS = 6
VARIANTS: list[dict[str, Any]] = [
    {"format": "gptq", "group_size": 64},
    {"format": "awq", "group_size": 64},
    {"format": "gguf", "type": "Q4_K_M", "imatrix": True},
    {"format": "gguf", "type": "Q4_K_M", "gptq": True},
]


def tensor(name: str) -> torch.Tensor:
    return torch.arange(1.0, 1 + torch.Size(TABLE[name][1]).numel()).reshape(TABLE[name][1]) * (1 + int(name[1:]))


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- shards ---------------------------------------------------------------------------------------------------------


def write(writer: ShardWriter, count: int) -> None:
    for name in islice(TABLE, writer.written, count):
        writer.write(name, tensor(name))


@settings(deadline=None, max_examples=60)
@given(st.integers(60, 700), st.integers(0, 8), st.integers(0, 8), st.binary(max_size=40))
def test_shards_that_go_on_have_the_bytes_of_shards_that_never_stopped(
    shard_bytes: int, recorded: int, more: int, garbage: bytes
) -> None:
    """Whatever was written after the record, tensors, other shards or garbage, is cut off."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        with ShardWriter(Path(one), TABLE, shard_bytes) as writer:
            write(writer, len(TABLE))
            names = writer.finish()
        stopped = ShardWriter(Path(other), TABLE, shard_bytes)
        write(stopped, recorded)
        state = stopped.state()
        write(stopped, max(recorded, more))
        stopped.__exit__(None, None, None)
        for path in [*Path(other).iterdir()][-1:]:
            path.write_bytes(path.read_bytes() + garbage)
        with ShardWriter(Path(other), TABLE, shard_bytes) as writer:
            assert writer.resume(state)
            assert writer.written == recorded
            write(writer, len(TABLE))
            assert writer.finish() == names
        assert files(Path(other)) == files(Path(one))


@pytest.mark.parametrize("damage", ["a byte", "cut short", "gone", "another table", "no record"])
def test_shards_that_are_not_what_the_record_says_are_not_used(tmp_path: Path, damage: str) -> None:
    writer = ShardWriter(tmp_path, TABLE)
    write(writer, 5)
    state: dict[str, Any] = writer.state()
    writer.__exit__(None, None, None)
    (path,) = tmp_path.iterdir()
    data, table = bytearray(path.read_bytes()), TABLE
    if damage == "a byte":
        data[-3] ^= 1
        path.write_bytes(data)
    elif damage == "cut short":
        path.write_bytes(data[:-1])
    elif damage == "gone":
        path.unlink()
    elif damage == "another table":
        table = {"t0": ("F32", (2, 7)), **{name: entry for name, entry in TABLE.items() if name != "t0"}}
    else:
        state = {"tensors": "5", "pieces": None}
    before = files(tmp_path)
    assert not ShardWriter(tmp_path, table).resume(state)
    assert files(tmp_path) == before


# --- the pass, in this process ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    checkpoint = make_checkpoint(root / "deep", TinyModel(blocks=BLOCKS))
    text = [f"Paragraph {index}: the quick brown fox jumps over the lazy dog. " * 3 for index in range(12)]
    (root / "text.txt").write_text("\n\n".join(text))
    return write_recipe(root / "deep.yaml", checkpoint, VARIANTS, calibration=CALIBRATION)


class Pass:
    """The calibration pass of the recipe in a folder of its own, run in this process."""

    def __init__(self, recipe_path: Path, root: Path) -> None:
        self.recipe, self.root, self.cache = (
            load_recipe(recipe_path, option_models()),
            root,
            Cache(root.parent / "cache"),
        )
        self.said = ListReporter()

    def run(self, memory_budget: int | None = None) -> dict[str, Any]:
        """Losses and all else in the parts' folders but the records; {variant: error} goes into `errors`."""
        assert self.recipe.calibration is not None
        self.said.events.clear()
        source = pin_source(self.recipe, self.cache, SilentReporter())
        checkpoint, limits = open_source(source, self.cache, SilentReporter()), RunLimits(1, "cpu", memory_budget)
        works = []
        for variant in self.recipe.variants:
            folders = [self.root / variant.name, self.root / f"{variant.name}.scratch"]
            for folder in (*folders, self.root / "pass"):
                folder.mkdir(parents=True, exist_ok=True)
            options = (variant.name, variant.options, source, checkpoint, self.cache, *folders, limits)
            works.append((variant.format, Context(*options)))
        base = self.recipe.path.parent
        result = calibrated._pass(self.said, self.recipe.calibration, base, works, self.root / "pass")
        assert result.errors == {}
        return {name: data for name, data in files(self.root).items() if not name.endswith(RESUME_NAME)}

    @property
    def text(self) -> str:
        return "\n".join(event.text for event in self.said.events)


@pytest.fixture
def passes(recipe_path: Path, tmp_path: Path) -> Pass:
    return Pass(recipe_path, tmp_path / "stopped")


@pytest.fixture(scope="module")
def undisturbed(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return Pass(recipe_path, tmp_path_factory.mktemp("undisturbed") / "pass").run()


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have the pass find itself asked to stop once so many blocks were done since."""

    def arrange(blocks: int) -> None:
        answers: Iterator[bool] = iter([*[False] * (blocks - 1), True])
        monkeypatch.setattr(calibrated, "stop_asked", lambda _: next(answers, False))

    return arrange


@pytest.mark.parametrize("memory_budget", [None, 1])
def test_a_pass_stopped_after_every_block_leaves_the_same_bytes(
    passes: Pass, undisturbed: dict[str, Any], stop_after: Callable[[int], None], memory_budget: int | None
) -> None:
    for block in range(1, BLOCKS + 1):
        stop_after(1)
        with pytest.raises(Stopped, match=f"stopped after block {block} of {BLOCKS}"):
            passes.run(memory_budget)
        assert ("goes on" in passes.text) == (block > 1)
    assert passes.run(memory_budget) == undisturbed
    assert f"goes on after block {BLOCKS} of {BLOCKS}" in passes.text


def test_a_guided_pass_goes_on_wherever_it_was_stopped(
    recipe_path: Path, tmp_path: Path, stop_after: Callable[[int], None]
) -> None:
    """In the way forward, at the head, on the way back, and in the pass itself."""
    guided = []
    for name in ("stopped", "unbroken"):
        (tmp_path / name).mkdir()
        found = Pass(recipe_path, tmp_path / name / "pass")
        assert found.recipe.calibration is not None
        spec = found.recipe.calibration.model_copy(update={"guided": True})
        variants = tuple(item for item in found.recipe.variants if item.format != "awq")
        found.recipe = replace(found.recipe, calibration=spec, variants=variants)
        guided.append(found)
    passes, unbroken = guided
    expected, places = unbroken.run(), []
    for _ in range(10):
        stop_after(4)
        try:
            found_now = passes.run()
            break
        except Stopped as exc:
            places.append(exc.message)
    named = {name for name in expected if not name.startswith("pass/")}
    assert {name: found_now[name] for name in named} == {name: expected[name] for name in named}
    assert places == [*["stopped in the guided statistics"] * 3, "stopped after block 3 of 6"]


def test_a_part_whose_files_are_damaged_starts_over_and_the_others_go_on(
    passes: Pass, undisturbed: dict[str, Any], stop_after: Callable[[int], None]
) -> None:
    stop_after(4)
    with pytest.raises(Stopped):
        passes.run()
    path = passes.root / "gptq-int4-g64" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)
    assert passes.run() == undisturbed
    assert "after block 0 of 6 (done: gptq-int4-g64 0, awq-int4-g64 4, q4_k_m-imatrix 4, q4_k_m-gptq 4)" in passes.text


def test_damaged_hidden_states_cost_the_forward_pass_and_no_solve(
    passes: Pass, undisturbed: dict[str, Any], stop_after: Callable[[int], None]
) -> None:
    stop_after(4)
    with pytest.raises(Stopped):
        passes.run()
    (states,) = (passes.root / "pass").glob("hidden.*")
    states.write_bytes(states.read_bytes()[:-4])
    assert passes.run() == undisturbed
    assert "goes on after block 4 of 6" in passes.text
    assert "damaged or gone" in passes.text


def test_another_device_or_text_starts_over_and_says_why(
    passes: Pass, undisturbed: dict[str, Any], stop_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(3)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SSE9")
        with pytest.raises(Stopped):
            passes.run()
    assert passes.run() == undisturbed
    assert re.search(r'device was "cpu SSE9.*", is "cpu ', passes.text)
    assert "goes on" not in passes.text


def test_the_record_on_disk_stays_small(passes: Pass, stop_after: Callable[[int], None]) -> None:
    for _ in range(3):
        stop_after(1)
        with pytest.raises(Stopped):
            passes.run()
    assert len([*(passes.root / "pass").iterdir()]) == 2  # one block's hidden states, and what they are
    assert read_json(passes.root / "pass" / RESUME_NAME)["states"]["block"] == 3


# --- the command ------------------------------------------------------------------------------------------------------

OPTIONS = ["--no-eval", "--threads", "1", "--only", "q4_k_m-gptq"]  # one variant, solved after the pass


@pytest.fixture(scope="module")
def expected(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Builds:
    builds = Builds(recipe_path, tmp_path_factory.mktemp("expected"), OPTIONS)
    code, said = builds.run()
    assert (code, leftovers_of(builds.work)) == (0, ()), said
    return builds


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_build_that_is_stopped_goes_on_and_ends_with_the_same_digests(
    name: str, recipe_path: Path, tmp_path: Path, expected: Builds
) -> None:
    builds = Builds(recipe_path, tmp_path / "work", OPTIONS)
    stops = stopped_again_and_again(builds, at_blocks(builds), signal.Signals[name], most=1)
    codes = {"SIGKILL": {-9}, "SIGTERM": {143}, "SIGINT": {130}}[name]
    assert [(item.ok, item.exit_code in codes, item.done > 0) for item in stops] == [(True, True, True)]
    assert builds.digests() == expected.digests()
    assert leftovers_of(builds.work) == ()
