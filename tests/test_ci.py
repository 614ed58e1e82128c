"""The workflow that checks this project: it fits its schema, may only read, and tests each Python that is stated."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml

from tests.serve.test_lavapipe import MEASURE

ROOT = Path(__file__).parent.parent
CI = ROOT / ".github" / "workflows" / "ci.yml"
PUBLISH = ROOT / ".github" / "workflows" / "publish-artifacts.yml"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIN = re.compile(r"[\w-]+/[\w-]+@[0-9a-f]{40}")


def workflow(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(path.read_text())
    return data


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in workflow(path)["jobs"].values() for step in job["steps"]]


def test_it_fits_its_schema() -> None:
    command = [Path(sys.executable).parent / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", CI]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_actions_are_pinned_to_the_commits_of_the_other_workflow() -> None:
    used = {step["uses"] for step in steps(CI) if "uses" in step}
    assert used <= {step["uses"] for step in steps(PUBLISH) if "uses" in step}
    assert all(PIN.fullmatch(item) for item in used)


def test_no_job_may_do_more_than_read() -> None:
    found = workflow(CI)
    assert found["permissions"] == {}
    assert [*found["jobs"]] == ["lint", "test", "classes", "lowest", "wheel", "lavapipe"]
    assert all(job["permissions"] == {"contents": "read"} for job in found["jobs"].values())
    checkouts = [step for step in steps(CI) if "actions/checkout@" in step.get("uses", "")]
    assert len(checkouts) == len(found["jobs"])
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_every_python_that_the_project_is_for_is_tested() -> None:
    stated = re.findall(r"Programming Language :: Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert workflow(CI)["jobs"]["test"]["strategy"]["matrix"]["python"] == stated
    assert PROJECT["requires-python"] == f">={stated[0]}"


def test_llama_cpp_is_compiled_for_any_processor() -> None:
    assert workflow(CI)["env"]["CMAKE_ARGS"] == "-DGGML_NATIVE=OFF"


def test_the_job_with_a_gpu_that_is_none_runs_apart_and_its_cache_is_of_what_it_compiles(tmp_path: Path) -> None:
    job = workflow(CI)["jobs"]["lavapipe"]
    assert job["if"] == "github.event_name == 'schedule' || github.event_name == 'workflow_dispatch'"
    (cache,) = [step for step in job["steps"] if "actions/cache@" in step.get("uses", "")]
    assert cache["with"]["key"] == "${{ steps.prepared.outputs.key }}"
    for name in ("glslc", "c++"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} ${{VERSION:-1}}\n")
        (tmp_path / name).chmod(0o755)

    def key(**changed: str) -> str:
        given = {"PATH": f"{tmp_path}:/usr/bin:/bin", **changed}
        return subprocess.check_output([ROOT / "ci" / "lavapipe", "--key"], env=given, text=True)

    assert key() == key()
    assert len({key(), key(VERSION="2"), key(TYPES="F32")}) == 3
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$PWD $3"\nexit 7\n')
    python.chmod(0o755)
    command = [ROOT / "ci" / "lavapipe", "bin/python", "made"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stdout.decode()) == (7, f"{tmp_path}/made download\n"), "as the job calls it"
    compile(MEASURE, "what the job measures", "exec")
    script = (ROOT / "ci" / "lavapipe").read_text()
    assert os.access(ROOT / "ci" / "lavapipe", os.X_OK)
    assert "$here/../constraints.txt" in script  # the release whose library it stands beside
