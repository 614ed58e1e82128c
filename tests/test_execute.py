"""A plan is data, and what runs is the plan: here, later, elsewhere, for a build and a rebuild alike."""

from __future__ import annotations

import ast
import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import quantize
from quantize.build import execute as steps
from quantize.build import make as making
from quantize.build.calibrate import PassResult
from quantize.build.execute import execute
from quantize.build.execution import RunOptions
from quantize.build.outcome import OutcomeState
from quantize.build.plan import Plan, confirm, look, make_plan
from quantize.build.size import size_plan
from quantize.calibration.datasets import find_dataset
from quantize.errors import BuildError, PlanError, UsageError
from quantize.events import EventKind, ListReporter
from quantize.formats import option_models
from quantize.formats.base import Context, RunLimits
from quantize.recipe.model import load_recipe
from quantize.store.manifest import CalibrationEntry
from quantize.store.workspace import Workspace
from quantize.testing import FakeBuilder, FakeOptions, installed_formats, plain_format, write_recipe
from tests.bad_checkpoints import change_json
from tests.conftest import Run, build
from tests.test_structure import TEXTS

FAKE: list[dict[str, Any]] = [{"format": "fake"}, {"format": "fake", "bits": 4}]
CALIBRATION = {"dataset": "text.txt", "samples": 2, "sequence_length": 64}


class Calibrated(FakeBuilder):
    """The fake format, with a pass before it."""

    def needs_calibration(self, options: FakeOptions) -> bool:
        return True


@pytest.fixture
def path(own_tiny: Path, tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("The quick brown fox.")
    return write_recipe(tmp_path / "demo.yaml", own_tiny, FAKE, calibration=CALIBRATION)


@pytest.fixture
def plan(path: Path, fake: FakeBuilder, workspace: Workspace) -> Plan:
    return make_plan(load_recipe(path, option_models()), workspace)


def states(plan: Plan, workspace: Workspace) -> list[OutcomeState]:
    return [outcome.state for outcome in execute(plan, workspace)]


# --- a plan is data ---------------------------------------------------------------------------------------------------


def test_a_plan_writes_nothing_and_says_what_it_is(plan: Plan, workspace: Workspace) -> None:
    data = json.loads(json.dumps(plan.to_data()))
    assert data == plan.to_data()
    assert [item["name"] for item in data["variants"]] == ["int8", "int4"]
    assert data["variants"][1]["options"] == {"format": "fake", "bits": 4, "fail": None}
    assert (data["calibrated_together"], data["measured"]) == ([], [])  # no runtime is known for the fake format
    assert not workspace.store.root.exists()


def test_a_plan_that_was_pickled_is_the_same_and_runs(plan: Plan, workspace: Workspace, fake: FakeBuilder) -> None:
    other = pickle.loads(pickle.dumps(plan))
    assert other == plan
    assert [job.build_key for job in other.jobs] == [job.build_key for job in plan.jobs]
    assert states(other, workspace) == [OutcomeState.BUILT] * 2
    assert fake.built == ["int8", "int4"]


def test_sizes_are_a_step_of_their_own_and_change_nothing_of_the_plan(plan: Plan, workspace: Workspace) -> None:
    sized = size_plan(plan, workspace, RunLimits())
    assert sized.part(replace(job, size=None) for job in sized.jobs) == plan
    assert pickle.loads(pickle.dumps(sized)) == sized
    assert json.loads(json.dumps(sized.to_data()))["disk_needed_bytes"] == sized.disk.peak_bytes > 0
    assert states(sized, workspace) == [OutcomeState.BUILT] * 2


def test_what_shares_a_pass_and_what_is_measured(tiny: Path, tmp_path: Path, workspace: Workspace) -> None:
    variants = [
        {"format": "gguf", "type": "Q8_0"},
        {"format": "gguf", "type": "Q4_0", "imatrix": True},
        {"format": "gptq"},
    ]
    (tmp_path / "text.txt").write_text("The quick brown fox.")
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tiny, variants, calibration=CALIBRATION), option_models())
    plan = make_plan(recipe, workspace)
    assert [job.name for job in plan.calibrated] == ["q4_0-imatrix", "gptq-int4-g128"]
    assert plan.measured == plan.jobs
    assert make_plan(recipe, workspace, evaluate=False).measured == ()
    part = make_plan(recipe, workspace, only=["q8_0"])
    assert ([job.name for job in part.jobs], part.calibrated) == (["q8_0"], ())
    with pytest.raises(UsageError, match="the recipe has no variant 'q9'"):
        make_plan(recipe, workspace, only=["q9"])


# --- run again, run later ---------------------------------------------------------------------------------------------


def test_the_same_plan_twice_is_up_to_date(plan: Plan, workspace: Workspace, fake: FakeBuilder) -> None:
    assert states(plan, workspace) == [OutcomeState.BUILT] * 2
    assert states(plan, workspace) == [OutcomeState.UP_TO_DATE] * 2
    assert len(fake.built) == 2


def test_a_plan_notices_what_another_build_has_finished_since(
    plan: Plan, workspace: Workspace, fake: FakeBuilder
) -> None:
    build(plan.recipe, workspace, only=["int4"])
    assert [job.existing for job in plan.jobs] == [None, None]
    assert [job.is_up_to_date for job in look(plan, workspace.store).jobs] == [False, True]
    assert states(plan, workspace) == [OutcomeState.BUILT, OutcomeState.UP_TO_DATE]
    assert fake.built == ["int4", "int8"]


def test_by_force_what_is_there_is_made_again(path: Path, workspace: Workspace, fake: FakeBuilder) -> None:
    recipe = load_recipe(path, option_models())
    build(recipe, workspace, only=["int8"])
    plan = make_plan(recipe, workspace, only=["int8"], force=True)
    assert plan.todo == plan.jobs
    assert (states(plan, workspace), fake.built) == ([OutcomeState.BUILT], ["int8", "int8"])


def test_what_its_gates_refused_is_no_work_and_not_up_to_date(
    tiny: Path, tmp_path: Path, workspace: Workspace, fake: FakeBuilder, run: Run
) -> None:
    path = write_recipe(tmp_path / "demo.yaml", tiny, [{"format": "fake", "fail": "verify"}])
    assert run("build", path).exit_code == 3
    plan = make_plan(load_recipe(path, option_models()), workspace)
    (job,) = plan.jobs
    assert (plan.todo, job.is_up_to_date) == ((), False)
    assert "built, refused by its gates (" in run("plan", path).stdout
    assert json.loads(run("plan", path, "--json").stdout)["variants"][0]["up_to_date"] is False


# --- a plan from elsewhere --------------------------------------------------------------------------------------------


def test_a_plan_whose_source_has_changed_is_refused(plan: Plan, own_tiny: Path, workspace: Workspace) -> None:
    change_json(own_tiny / "config.json", rope_theta=500_000.0)
    with pytest.raises(PlanError, match="the source local:model is not what the plan was made of"):
        confirm(plan, workspace)


def test_a_plan_made_with_another_version_is_refused(
    plan: Plan, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.store.manifest.metadata.version", lambda _: "9.9")
    with pytest.raises(PlanError, match=r'int8 is not what was planned: tools\.numpy was "[\d.]+", is "9\.9"'):
        confirm(plan, workspace)


def test_a_source_that_lies_elsewhere_is_found_by_the_recipe(
    plan: Plan, path: Path, own_tiny: Path, workspace: Workspace
) -> None:
    moved = replace(plan, source=replace(plan.source, location=own_tiny / "of another machine"))
    assert confirm(moved, workspace) == plan


def test_build_takes_a_plan(plan: Plan, own_tiny: Path, workspace: Workspace, fake: FakeBuilder) -> None:
    reporter = ListReporter()
    assert [item.state for item in quantize.build(plan, only=["int4"], reporter=reporter)] == [OutcomeState.BUILT]
    assert [item.state for item in quantize.build(plan)] == [OutcomeState.BUILT, OutcomeState.UP_TO_DATE]
    assert fake.built == ["int4", "int8"]
    with pytest.raises(UsageError, match="the recipe has no variant 'int3'"):
        quantize.build(plan, only=["int3"])
    change_json(own_tiny / "config.json", rope_theta=500_000.0)
    with pytest.raises(PlanError, match="plan was made of"):
        quantize.build(plan)


# --- one wiring -------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The steps that are run, in order, of a format that needs a pass; the pass itself does nothing."""
    seen: list[str] = []

    def passing(recipe: Any, variants: list[tuple[str, Context]], folder: Path, *_: Any) -> PassResult:
        seen.append(f"pass of {len(variants)}")
        assert folder.is_dir()
        entry = CalibrationEntry(
            spec=find_dataset(recipe.calibration, recipe.path.parent).stated(),
            hash="0" * 64,
            sequences=2,
            tokens=128,
            seed=0,
        )
        return PassResult(entry, "a processor", {}, {"seconds": 1.0})

    def recording(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, step)

    builder = Calibrated()
    monkeypatch.setattr(steps, "run_pass", passing)
    for name in ("check", "build", "verify"):
        recording(builder, name)
    for name in ("assemble", "keep_only", "set_aside"):
        recording(making, name)
    with installed_formats(plain_format(builder)):
        yield seen


def test_rebuild_runs_the_steps_of_a_build(
    recorded: list[str], own_tiny: Path, tmp_path: Path, run: Run, workspace: Workspace
) -> None:
    """All but the verification of what is compared with a verified artifact."""
    (tmp_path / "text.txt").write_text("The quick brown fox.")
    path = write_recipe(tmp_path / "demo.yaml", own_tiny, FAKE[:1], calibration=CALIBRATION)
    (outcome,) = build(load_recipe(path, option_models()), workspace)
    assert outcome.error is None
    assert recorded == ["check", "pass of 1", "build", "verify", "assemble", "keep_only", "set_aside"]
    of_build = [step for step in recorded if step != "verify"]
    recorded.clear()
    result = quantize.rebuild("demo/int8", calibration=tmp_path / "text.txt", keep=tmp_path / "kept")
    assert recorded == of_build
    assert result.differences == ()


def test_one_module_wires_the_steps() -> None:
    """Who else calls one of them has wired a build of its own."""
    wired = {"run_pass": "build.execute", "make": "build.execute", "assemble": "build.make", "set_aside": "build.make"}
    found: dict[str, set[str]] = {name: set() for name in wired}
    for module, text in TEXTS.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in wired:
                found[node.func.id].add(module)
    assert found.pop("set_aside") == {"build.make", "build.settle"}  # what its gates refuse
    assert found == {name: {module} for name, module in wired.items() if name != "set_aside"}


def test_how_a_rebuild_ended_is_not_told_twice(
    plan: Plan, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(plan, workspace)
    reporter = ListReporter()
    quantize.rebuild("demo/int8", reporter=reporter)
    assert {event.kind for event in reporter.events} & {EventKind.DONE, EventKind.FAILED} == set()

    def fail(*_: object) -> None:
        raise BuildError("it broke")

    monkeypatch.setattr(FakeBuilder, "build", fail)
    with pytest.raises(BuildError, match="it broke"):
        quantize.rebuild("demo/int8", reporter=reporter)
    assert {event.kind for event in reporter.events} & {EventKind.DONE, EventKind.FAILED} == set()


def test_a_run_that_does_not_judge_opens_nothing(
    tiny: Path, tmp_path: Path, workspace: Workspace, fake: FakeBuilder
) -> None:
    path = write_recipe(tmp_path / "demo.yaml", tiny, [{"format": "fake", "fail": "verify"}])
    plan = make_plan(load_recipe(path, option_models()), workspace)
    (outcome,) = execute(plan, workspace, RunOptions(judge=False))
    assert (outcome.state, outcome.error) == (OutcomeState.BUILT, None)
