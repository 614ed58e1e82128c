"""`quantize build --cluster`: recipes side by side on two nodes; what it says without a cluster, or Ray."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from quantize.build.execution import RunOptions
from quantize.build.outcome import OutcomeState
from quantize.build.plan import make_plan
from quantize.build.spread.cluster import Node
from quantize.build.spread.trace import read_trace
from quantize.cluster.units import ClusterOptions, Sizes, execute_on_cluster
from quantize.errors import PlanError, UsageError
from quantize.formats import option_models
from quantize.recipe.model import load_recipe
from quantize.store.workspace import Workspace
from quantize.testing import TinyModel, make_checkpoint, write_recipe
from tests.cluster.conftest import Nodes
from tests.conftest import Built, Run

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray warns while it starts and stops

VARIANTS = [{"format": "gguf", "type": "Q8_0"}]


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "tiny.yaml", tiny, VARIANTS)


@pytest.mark.usefixtures("fake")
def test_without_ray_it_says_how_to_install_it(
    tiny: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "fake.yaml", tiny, [{"format": "fake"}])
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run("build", recipe, "--cluster", "local")
    assert result.exit_code == 2
    assert "pip install 'quantize-models[ray]'" in result.stderr
    assert run("build", recipe, "--no-eval").exit_code == 0


def test_a_build_without_a_cluster_imports_no_ray() -> None:
    modules = "quantize.cli.build, quantize.build.calibrate, quantize.cluster.units"
    code = f"import sys, {modules}; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cluster", "somewhere"], "'somewhere' is no address of a cluster"),
        (["--cluster", "ray://"], "no address of a cluster"),
        (["--watch"], "--watch is for builds on a cluster"),
        (["--trace", "trace.json"], "--trace is for builds on a cluster"),
        (["--cluster", "local", "--device", "cuda:1"], "use --device cpu or --device cuda"),
    ],
)
def test_wrong_usage(options: list[str], said: str, recipe: Path, run: Run) -> None:
    result = run("build", recipe, *options)
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_cluster_that_does_not_answer(recipe: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def refuse(**_: object) -> None:
        raise ConnectionError("could not find any running Ray instance")

    monkeypatch.setattr(ray, "init", refuse)
    result = run("build", recipe, "--cluster", "auto")
    assert result.exit_code == 2
    assert "no Ray cluster answers at 'auto': could not find any running" in result.stderr
    assert "ray start --head" in result.stderr


@pytest.mark.parametrize("scheme", ["", "ray://", "auto"])
def test_an_address_at_which_nothing_listens_is_said_at_once(
    scheme: str, recipe: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"{scheme.removeprefix('auto')}127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        result = run("build", recipe, "--cluster", "auto" if scheme == "auto" else address)
    assert result.exit_code == 2
    assert f"no Ray cluster answers at '{address}': [Errno 111] Connection refused" in result.stderr


def test_recipes_are_built_side_by_side_with_the_digests_of_a_build_alone(
    nodes: Nodes, built: Built, tiny: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.ensure(1)
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    first = write_recipe(tmp_path / "tiny.yaml", tiny, VARIANTS)
    other = write_recipe(tmp_path / "other.yaml", make_checkpoint(tmp_path / "other", TinyModel(seed=1)), VARIANTS)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    calibration = {"dataset": "text.txt", "samples": 2, "sequence_length": 64, "minimum_tokens": 16}
    impossible = [{"format": "gptq", "group_size": 96}]
    broken = write_recipe(tmp_path / "broken.yaml", tmp_path / "other", impossible, calibration=calibration)
    trace = tmp_path / "trace.json"
    options = ("--no-eval", "--json", "--watch", "--trace", trace)
    result = run("build", first, other, broken, first, "--cluster", "auto", *options)  # one of them twice
    assert result.exit_code == 3, result.stderr
    found = json.loads(result.stdout)
    assert [item["recipe"] for item in found] == ["tiny", "other", "broken"]
    assert [item["state"] for item in found] == ["built", "built", "failed"]
    (alone,) = [item.artifact for item in built.outcomes if item.variant == "q8_0"]
    assert alone is not None
    assert found[0]["digest"] == alone.manifest.digest
    builds = [span for span in read_trace(trace) if not span.name.startswith("broken")]
    assert len({span.node for span in builds}) == len(builds) == 2
    table = run("build", first, other, "--no-eval")
    assert "RECIPE" in table.stdout
    assert table.stdout.count("up to date") == 2


def test_recipes_of_one_name_keep_their_own_outcomes(
    nodes: Nodes, recipe: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.ensure(1)
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    (tmp_path / "same").mkdir()
    model = make_checkpoint(tmp_path / "model", TinyModel(seed=2))
    same = write_recipe(tmp_path / "same" / recipe.name, model, VARIANTS)
    result = run("build", recipe, same, "--cluster", "auto", "--no-eval", "--json")
    found = json.loads(result.stdout)
    assert [item["recipe"] for item in found] == ["tiny", "tiny"]
    assert found[0]["digest"] != found[1]["digest"]


def node(cpus: int, gpus: int = 0) -> Node:
    return Node("n", "10.0.0.1", cpus, gpus, 0, 0)


def test_what_a_build_takes_of_the_nodes() -> None:
    assert Sizes.of([node(1), node(1)], gpu=False, threads=None) == Sizes(1, 0, 2, 1, 2)
    assert Sizes.of([node(64), node(32)], gpu=False, threads=None) == Sizes(32, 0, 3, 8, 12)
    assert Sizes.of([node(64)], gpu=False, threads=4) == Sizes(4, 0, 16, 4, 16)
    assert Sizes.of([node(96, 8)] * 2, gpu=True, threads=None) == Sizes(12, 1, 16, 12, 16)
    with pytest.raises(UsageError, match="no node has 5 cores; the largest has 4"):
        Sizes.of([node(4)], gpu=False, threads=5)


def test_a_node_refuses_what_is_not_what_was_planned(
    nodes: Nodes, recipe: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.ensure(1)
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    plan = make_plan(load_recipe(recipe, option_models()), workspace, evaluate=False)
    (job,) = plan.jobs
    other = replace(job, inputs={**job.inputs, "tools": {**job.inputs["tools"], "gguf": "0.0"}})
    changed = plan.part([other])
    ((_, outcome),) = execute_on_cluster([changed], workspace, RunOptions(), ClusterOptions("auto"))
    assert outcome.state is OutcomeState.FAILED
    assert isinstance(outcome.error, PlanError)
    assert re.fullmatch(r'q8_0 is not what was planned: tools\.gguf was "0\.0", is "[\d.]+"', outcome.error.message)
    assert workspace.store.artifacts() == []
