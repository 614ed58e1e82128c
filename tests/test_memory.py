"""The least memory of a calibration pass: arithmetic over one block, held against --memory-budget before a build."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantize.build.calibrate import _Part, _spill
from quantize.calibration.budget import BASE_BYTES, BlockMemory, largest_block, least_bytes, memory_short, pass_bytes
from quantize.calibration.journal import PassJournal
from quantize.errors import PlanError
from quantize.events import SilentReporter
from quantize.formats import builders, option_models
from quantize.formats.base import Context, RunLimits
from quantize.model.checkpoint import open_checkpoint
from quantize.model.source import pin_source
from quantize.recipe.model import load_recipe
from quantize.system.cache import Cache
from quantize.testing import TinyModel, make_checkpoint, write_recipe
from tests.conftest import Run

CALIBRATION = {"dataset": "python-docs", "samples": 4, "sequence_length": 64}
VARIANTS = [{"format": "gptq", "group_size": 64}, {"format": "awq", "group_size": 64}]


@pytest.fixture
def recipe_path(tiny: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "demo.yaml", tiny, VARIANTS, calibration=CALIBRATION)


def test_the_largest_block(tiny: Path) -> None:
    """hidden 256, intermediate 512, two key-value heads of 64: by hand."""
    linears = 256 * 256 * 2 + 2 * 128 * 256 + 3 * 512 * 256
    assert largest_block(open_checkpoint(tiny)) == BlockMemory(
        weights=4 * (linears + 2 * 256),
        largest=4 * 512 * 256,
        grams=(4 * 512 * 512, 4 * 256 * 256, 4 * 256 * 256, 4 * 256 * 256),
        width=512,
        stacked=4 * 2 * 512 * 256,
    )


def test_depth_costs_nothing_and_width_does(tmp_path: Path) -> None:
    def least(name: str, model: TinyModel, threads: int = 1) -> int:
        checkpoint = open_checkpoint(make_checkpoint(tmp_path / name, model))
        parts = [(builders()[item], option_models()[item](group_size=64)) for item in ("gptq", "awq")]
        return pass_bytes(checkpoint, parts, threads)

    shallow = least("shallow", TinyModel(blocks=1))
    assert least("deep", TinyModel(blocks=5)) == shallow
    assert least("wide", TinyModel(blocks=1, intermediate=2048)) > shallow + 4 * 2048 * 2048
    assert least("busy", TinyModel(blocks=1), threads=8) > shallow > BASE_BYTES


def test_an_importance_matrix_alone_takes_less(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    assert least_bytes(checkpoint, [0]) == least_bytes(checkpoint, []) < least_bytes(checkpoint, [1 << 27])
    assert least_bytes(checkpoint, [1 << 27]) < least_bytes(checkpoint, [1 << 27, 1 << 20])


def test_a_budget_that_is_too_small_is_refused_before_anything_is_written(
    recipe_path: Path, tmp_path: Path, run: Run
) -> None:
    planned = run("plan", recipe_path, "--memory-budget", "300MiB", "--threads", "1", "--json")
    least = int(json.loads(planned.stdout)["pass_memory_bytes"])
    assert planned.exit_code == 3
    assert f"takes at least {least / 2**20:,.0f} MiB, the budget is 300 MiB" in planned.stderr
    assert "raise --memory-budget, lower --threads, or build fewer of the calibrated variants" in planned.stderr
    built = run("build", recipe_path, "--memory-budget", "300MiB", "--threads", "1", "--no-eval")
    assert (built.exit_code, "the memory budget is too small" in built.stderr) == (3, True)
    assert not (tmp_path / "artifacts").exists()
    enough = run("plan", recipe_path, "--memory-budget", str(least), "--threads", "1")
    assert enough.exit_code == 0, enough.stderr
    assert "at the least for the calibration pass" in enough.stdout


def test_a_budget_says_nothing_to_what_needs_no_pass(tiny: Path, tmp_path: Path, run: Run) -> None:
    path = write_recipe(tmp_path / "demo.yaml", tiny, [{"format": "bitsandbytes", "type": "int8"}])
    planned = run("plan", path, "--memory-budget", "1MiB")
    assert planned.exit_code == 0
    assert "memory" not in planned.stdout


def test_hidden_states_get_what_the_budget_leaves(recipe_path: Path, tmp_path: Path) -> None:
    recipe, cache = load_recipe(recipe_path, option_models()), Cache(tmp_path / "cache")
    source = pin_source(recipe, cache, SilentReporter())
    checkpoint = open_checkpoint(source.location)
    solvers = [(builders()[item.format], item.options) for item in recipe.variants]
    least = pass_bytes(checkpoint, solvers, 1)

    def left(budget: int | None) -> int | None:
        parts = []
        for item in recipe.variants:
            options = (item.name, item.options, source, checkpoint, cache, tmp_path, tmp_path)
            context, builder = Context(*options, RunLimits(1, "cpu", budget)), builders()[item.format]
            parts.append(_Part(context, builder, builder.collector(context, SilentReporter())))
        return _spill(PassJournal(tmp_path, {}, SilentReporter()), parts, tmp_path).budget_bytes

    assert [left(None), left(least - 1), left(least), left(least + 99)] == [None, 0, 0, 99]


def test_the_refusal() -> None:
    error = memory_short(700 << 20, 600 << 20)
    assert isinstance(error, PlanError)
    assert error.exit_code == 3
    assert f"{100 << 20:,} bytes are missing" in error.message
