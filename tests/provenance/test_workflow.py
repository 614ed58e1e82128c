"""The CI job: its files pass their linters, ask for no more than they need, and its steps run as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantize.publish.pins import read_pins
from quantize.testing import write_recipe
from tests.conftest import Run
from tests.provenance.conftest import Keys
from tests.provenance.runner import Runner
from tests.publish.conftest import Registry

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
GITHUB = ROOT / ".github" / "workflows" / "publish-artifacts.yml"
GITLAB = ROOT / "ci" / "gitlab-publish.yml"
GOLDEN = """\
name: mine
prompts:
  - {id: same, prompt: The quick brown fox, max_tokens: 4, grade: {kind: same}}
"""


def passes(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def steps() -> list[dict[str, Any]]:
    jobs = yaml.safe_load(GITHUB.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def test_both_files_fit_their_schemas() -> None:
    passes(BIN / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", GITHUB)
    passes(BIN / "check-jsonschema", "--builtin-schema", "vendor.gitlab-ci", GITLAB)


def test_every_action_is_pinned_by_a_commit() -> None:
    used = [step["uses"] for step in steps() if "uses" in step]
    assert len(used) == 7
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", item) for item in used)


def test_no_job_may_do_more_than_it_must() -> None:
    workflow = yaml.safe_load(GITHUB.read_text())
    assert workflow["permissions"] == {}
    assert {name: job["permissions"] for name, job in workflow["jobs"].items()} == {
        "publish": {"contents": "read", "packages": "write"},
        "pins": {"contents": "write"},
    }
    assert [step["env"]["SIGN_KEY"] for step in steps() if "SIGN_KEY" in step.get("env", {})] == [
        "${{ secrets.SIGN_KEY }}"
    ]
    checkout = next(step for step in workflow["jobs"]["publish"]["steps"] if "checkout" in step["uses"])
    assert checkout["with"]["persist-credentials"] is False


def test_gitlab_runs_the_same_commands() -> None:
    def commands(text: str) -> list[str]:
        options = re.findall(r"quantize (?:build|eval|publish|list)[^|>\n]*", text)
        return [re.sub(r'"[^"]*"', "…", item).strip() for item in options]

    ours = commands("\n".join(step.get("run", "") for step in steps()))
    assert commands("\n".join(yaml.safe_load(GITLAB.read_text())["publish-artifacts"]["script"])) == ours
    assert [item.split()[1] for item in ours] == ["build", "eval", "publish", "list"]


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=Tester", "-c", "user.email=tester@example.org")
    done = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """A registry of this test's own."""
    if shutil.which("docker-registry") is None:
        pytest.skip("docker-registry is not installed")
    (tmp_path / "registry").mkdir()
    found = Registry(tmp_path / "registry")
    found.start()
    yield found
    found.stop()


@pytest.fixture
def repository(tiny: Path, tmp_path: Path, run: Run) -> Path:
    """A clone with two commits: the second adds a recipe and its lock."""
    git(tmp_path, "init", "--quiet", "--bare", "--initial-branch=main", "origin.git")
    git(tmp_path, "clone", "--quiet", "origin.git", "clone")
    clone = tmp_path / "clone"
    (clone / "recipes").mkdir()
    (clone / "mine.yaml").write_text(GOLDEN)
    (clone / ".gitignore").write_text("artifacts/\n.cache/\nchanged.txt\n")
    git(clone, "checkout", "--quiet", "-B", "main")
    git(clone, "add", ".")
    git(clone, "commit", "--quiet", "--message", "Start")
    recipe = write_recipe(
        clone / "recipes" / "tiny.yaml", tiny, [{"format": "gguf", "type": "Q8_0"}],
        evaluation={"window": 128, "windows": 2, "golden": ["mine.yaml"]},
    )  # fmt: skip
    locked = run("lock", recipe)
    assert locked.exit_code == 0, locked.stderr
    git(clone, "add", ".")
    git(clone, "commit", "--quiet", "--message", "A recipe")
    git(clone, "push", "--quiet", "origin", "main")
    return clone


def test_the_steps_run_in_order_against_a_registry(
    repository: Path, registry: Registry, keys: Keys, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = f"oci://127.0.0.1:{registry.port}/models"
    before, key = git(repository, "rev-parse", "HEAD^"), keys.private.read_text()
    expressions = {
        "github.workspace": str(repository), "github.event.before": before, "github.repository": "models",
        "inputs.recipe": "", "secrets.HF_TOKEN": "", "secrets.SIGN_KEY": key,
    }  # fmt: skip
    environment = {
        "PATH": f"{BIN}:{os.environ['PATH']}", "GITHUB_ACTIONS": "true", "GITHUB_SERVER_URL": "https://github.com",
        "GITHUB_REPOSITORY": "org/models", "GITHUB_RUN_ID": "7", "GITHUB_WORKFLOW_REF": "org/models/x.yml@main",
    }  # fmt: skip
    for name in ("QUANTIZE_STORE", "QUANTIZE_CACHE"):
        monkeypatch.delenv(name)  # the job's own
    scratch = tmp_path / "runner"
    scratch.mkdir()
    here = tmp_path / "publish.yml"
    here.write_text(GITHUB.read_text().replace("oci://ghcr.io/", f"oci://127.0.0.1:{registry.port}/"))
    runner = Runner(here, scratch, expressions, environment)
    runner.run_job("publish", repository, skip=("Install",))
    (pinned,) = read_pins(repository / "artifacts.lock")
    assert pinned.published[0].startswith(target)
    assert "| tiny | q8_0 | gguf |" in runner.summary
    assert pinned.digest in runner.summary

    fresh = tmp_path / "fresh"  # as the second job has it: its own checkout, and what the first one uploaded
    git(tmp_path, "clone", "--quiet", "origin.git", "fresh")
    shutil.copy(repository / "artifacts.lock", fresh)
    runner.run_job("pins", fresh)
    assert "artifacts.lock" in git(tmp_path / "origin.git", "show", "--stat", "main")

    store = ("--store", tmp_path / "pulled")
    assert run("pull", "--locked", "--lock", fresh / "artifacts.lock", *store).exit_code == 0
    checked = run("verify", "tiny/q8_0", "--hashes-only", "--public-key", keys.public, *store)
    assert (checked.exit_code, "signature too" in checked.stdout) == (0, True), checked.stderr
    statement = tmp_path / "pulled" / "tiny" / "q8_0" / "current" / "provenance.json"
    assert "https://github.com/org/models/actions/runs/7" in statement.read_text()
