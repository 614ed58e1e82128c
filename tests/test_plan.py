"""Plans: exact sizes from headers, what is built already, what can't work; and nothing written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from quantize.build.disk import PAPERS_BYTES, disk_free_bytes
from quantize.build.execute import execute
from quantize.build.plan import make_plan
from quantize.build.size import SizedPlan, size_plan
from quantize.errors import PlanError, UsageError
from quantize.events import SilentReporter
from quantize.formats import builders, option_models
from quantize.formats.base import RunLimits
from quantize.recipe.model import load_recipe
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.testing import FakeBuilder, TinyModel, installed_formats, make_checkpoint, plain_format, write_recipe
from tests.conftest import BUILT_TYPES, Built, Run

FAKE = [{"format": "fake"}, {"format": "fake", "bits": 4}]


def plan_for(path: Path, store: Store, cache: Cache) -> SizedPlan:
    workspace = Workspace(store, cache, SilentReporter())
    return size_plan(make_plan(load_recipe(path, option_models()), workspace), workspace, RunLimits())


def test_planned_sizes_are_the_built_sizes(built: Built, tiny: Path, store: Store, cache: Cache) -> None:
    """From headers alone, with an empty cache: no weight was read to say this."""
    plan = plan_for(built.recipe.path, store, cache)
    assert len(plan.jobs) == len(BUILT_TYPES) >= 5
    assert [job.refusal for job in plan.jobs] == [None] * len(plan.jobs)
    assert not store.root.exists()
    assert not (cache.root / "gguf").exists()
    artifacts = {item.manifest.variant: item for item in built.store.artifacts()}
    for job in plan.jobs:
        manifest = artifacts[job.variant.name].manifest
        (file,) = artifacts[job.variant.name].folder.glob("*.gguf")
        assert job.size is not None
        assert job.size.file_bytes == file.stat().st_size, job.variant.name
        assert job.size.bits_per_weight == manifest.bits_per_weight
        assert [item.tensor for item in job.size.kept] == [item.tensor for item in manifest.kept_in_high_precision]
        assert job.build_key == manifest.build_key
    needed = sum(job.size.file_bytes for job in plan.jobs if job.size)
    f16 = next(job.size.file_bytes for job in plan.jobs if job.variant.name == "f16" and job.size)
    assert plan.disk.intermediates == f16, "one shared 16-bit file beside them"
    beside = PAPERS_BYTES + sum(path.stat().st_size for path in tiny.glob("LICENSE*"))
    assert plan.disk.artifacts == needed + beside * len(plan.jobs)
    assert plan.disk.peak_bytes == sum((f16, plan.disk.artifacts, plan.disk.baseline))


def test_a_plan_of_what_is_built_says_so(built: Built) -> None:
    plan = plan_for(built.recipe.path, built.store, built.cache)
    assert [job.existing is not None for job in plan.jobs] == [True] * len(plan.jobs)
    assert (plan.todo, plan.disk.peak_bytes) == ((), 0)


def test_sizes_from_the_cached_16_bit_file_are_the_same(built: Built, store: Store) -> None:
    plan = plan_for(built.recipe.path, store, built.cache)
    artifacts = {item.manifest.variant: item for item in built.store.artifacts()}
    for job in plan.jobs:
        (file,) = artifacts[job.variant.name].folder.glob("*.gguf")
        assert job.size is not None
        assert (job.size.file_bytes, job.size.intermediate_bytes) == (file.stat().st_size, 0)


@pytest.mark.usefixtures("fake")
def test_the_table_and_the_json(tiny: Path, tmp_path: Path, run: Run) -> None:
    path = write_recipe(tmp_path / "demo.yaml", tiny, FAKE)
    table = run("plan", path)
    assert table.exit_code == 0
    assert [word in table.stdout for word in ("int8", "int4", "to build", "local:tiny", "needed at the peak")] == [
        True
    ] * 5
    data = json.loads(run("plan", path, "--json").stdout)
    parameters = sum(array.size for array in TinyModel().weights().values())
    norms = sum(shape[0] for shape in TinyModel().shapes().values() if len(shape) == 1)
    assert [item["weights_bytes"] for item in data["variants"]] == [parameters + 3 * norms] * 2
    beside = PAPERS_BYTES + sum(path.stat().st_size for path in tiny.glob("LICENSE*"))
    assert data["disk_needed_bytes"] == sum(item["file_bytes"] + beside for item in data["variants"])
    run("build", path, "--only", "int8")
    assert "up to date (" in run("plan", path).stdout
    data = json.loads(run("plan", path, "--json").stdout)
    assert [item["up_to_date"] for item in data["variants"]] == [True, False]
    assert data["disk_needed_bytes"] == data["variants"][1]["file_bytes"] + beside


@pytest.mark.usefixtures("fake")
def test_a_disk_that_is_too_small_refuses(
    tiny: Path, tmp_path: Path, run: Run, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.build.disk.disk_free_bytes", lambda _: 1_000_000)
    monkeypatch.setattr("quantize.build.size.disk_free_bytes", lambda _: 1_000_000)
    path = write_recipe(tmp_path / "demo.yaml", tiny, FAKE)
    result = run("plan", path, "--json")
    assert result.exit_code == 3
    needed = int(json.loads(result.stdout)["disk_needed_bytes"])
    assert "error: the disk is too small for the store and cache: 3.0 MB are needed at the peak" in result.stderr
    assert f"1.0 MB are free, {needed - 1_000_000:,} bytes are missing" in result.stderr
    assert "choose another --store" in result.stderr
    refused = run("build", path)
    assert (refused.exit_code, "bytes are missing" in refused.stderr) == (3, True)
    assert not store.root.exists()


@pytest.mark.parametrize("step", ["check", "sizes"])
def test_one_refusal_leaves_the_others_planned(
    step: str, tiny: Path, tmp_path: Path, run: Run, fake: FakeBuilder
) -> None:
    path = write_recipe(tmp_path / "demo.yaml", tiny, [{"format": "fake", "fail": step}, *FAKE])
    result = run("plan", path, "--json")
    assert result.exit_code == 3
    refusals = [item["refusal"] for item in json.loads(result.stdout)["variants"]]
    assert str(refusals[0]).startswith("the fake format ")
    assert refusals[1:] == [None, None]


def test_calibration_that_is_missing(tiny: Path, tmp_path: Path, workspace: Workspace) -> None:
    """It refuses the variants that need it, and those alone; a file that names none has a default."""
    variants = [{"format": "gguf", "type": "Q4_K_M", "imatrix": True}, {"format": "gguf", "type": "Q8_0"}]
    recipe = load_recipe(write_recipe(tmp_path / "demo.yaml", tiny, variants), option_models())
    plan = make_plan(replace(recipe, calibration=None), workspace, evaluate=False)
    refused, other = (job.refusal for job in plan.jobs)
    assert refused is not None
    assert refused.message == "variant q4_k_m-imatrix needs calibration, and the recipe has none"
    assert (refused.hint, other) == ("add `calibration: starter`", None)
    outcomes = execute(plan, workspace)
    assert [item.state.value for item in outcomes] == ["failed", "built"]
    assert outcomes[0].error is refused


def test_free_space_is_asked_where_the_store_will_be(tmp_path: Path) -> None:
    assert disk_free_bytes(tmp_path / "not" / "yet" / "there") == pytest.approx(disk_free_bytes(tmp_path), rel=0.05)


# --- what makes another build -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake")
def test_only_what_can_change_bytes_is_in_the_build_key(tiny: Path, tmp_path: Path, store: Store, cache: Cache) -> None:
    def keys(**others: Any) -> list[str]:
        path = write_recipe(tmp_path / f"{others.pop('file', 'demo')}.yaml", tiny, FAKE, **others)
        return [job.build_key for job in plan_for(path, store, cache).jobs]

    plain = keys()
    assert len(set(plain)) == 2
    assert keys(description="some words") == plain
    assert keys(file="another-name") == plain
    assert keys(gates={"max_kl": 0.1}) == plain
    assert not set(keys(source={"model": str(tiny), "license": "mit"})) & set(plain)


# --- plugins ----------------------------------------------------------------------------------------------------------


def test_two_plugins_of_one_name() -> None:
    with (
        installed_formats(plain_format(FakeBuilder()), plain_format(FakeBuilder())),
        pytest.raises(UsageError, match="two plugins bring the format"),
    ):
        option_models()


def test_a_plugin_that_does_not_load() -> None:
    with installed_formats():
        point = mock.Mock(load=mock.Mock(side_effect=ImportError("no such library")))
        point.name, point.dist.name = "broken", "quantize-broken"
        with (
            mock.patch("quantize.formats.entry_points", return_value=[point]),
            pytest.raises(UsageError, match="the format plugin 'broken' can't be loaded: no such library") as caught,
        ):
            builders()
    assert caught.value.hint == "update or uninstall quantize-broken"


def test_a_format_that_is_not_installed_is_refused(tiny: Path, tmp_path: Path, run: Run) -> None:
    with installed_formats(plain_format(FakeBuilder())):
        result = run("plan", write_recipe(tmp_path / "demo.yaml", tiny, [{"format": "gguf", "type": "Q8_0"}]))
    assert result.exit_code == 2
    assert "unknown format 'gguf'" in result.stderr


# --- names that llama.cpp refuses -------------------------------------------------------------------------------------


def test_what_llama_cpp_refuses_is_a_refusal_of_that_variant(tmp_path: Path, store: Store, cache: Cache) -> None:
    """A type that needs an importance matrix, and an override that matches nothing; a third variant still plans."""
    model = make_checkpoint(tmp_path / "small", TinyModel(blocks=1))
    variants = [
        {"format": "gguf", "type": "IQ2_XXS"},
        {"format": "gguf", "type": "Q8_0", "overrides": {"no_such_tensor": "F16"}},
        {"format": "gguf", "type": "Q8_0"},
    ]
    plan = plan_for(write_recipe(tmp_path / "demo.yaml", model, variants), store, cache)
    first, second, third = plan.jobs
    assert isinstance(first.refusal, PlanError)
    assert first.refusal.message == "IQ2_XXS needs an importance matrix"
    assert isinstance(second.refusal, PlanError)
    assert second.refusal.message == "override 'no_such_tensor' matches no tensor"
    assert third.refusal is None
    assert third.size is not None


def test_the_blocks_of_a_refused_plan_come_without_a_traceback(tiny: Path, tmp_path: Path, run: Run) -> None:
    """-v asks for the blocks here; that a size does not divide a width is no defect."""
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny, [{"format": "gptq", "group_size": 1000}])
    result = run("plan", recipe, "-v", "--store", tmp_path / "store")
    assert result.exit_code in (2, 3)
    assert "group_size 1000 does not divide" in result.stderr
    assert "sizes that do: 16, 32, 64, 128, 256" in result.stderr
    assert "Traceback" not in result.stderr
