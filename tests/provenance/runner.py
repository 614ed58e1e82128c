"""A CI runner for a test: the `run:` steps of a workflow file, in order, as they stand, in bash as GitHub runs it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

EXPRESSION = re.compile(r"\$\{\{\s*(.+?)\s*\}\}")
SHELL = ("bash", "--noprofile", "--norc", "-eo", "pipefail")
CONDITION = re.compile(r"(?P<name>steps\.[\w.]+|needs\.[\w.]+) == '(?P<value>[^']*)'")


class Runner:
    """Runs jobs of one workflow. expressions: what each ${{ … }} in it stands for; an unknown one is an error."""

    def __init__(
        self, path: Path, scratch: Path, expressions: Mapping[str, str], environment: Mapping[str, str]
    ) -> None:
        self.jobs: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        self._scratch, self._expressions = scratch, dict(expressions)
        self._environment = dict(environment)
        self.summary = ""
        self.log: list[str] = []

    def run_job(self, name: str, folder: Path, *, skip: tuple[str, ...] = ()) -> None:
        """Run a job's own steps; those of actions, and those named in `skip`, are left out."""
        job = self.jobs[name]
        for index, step in enumerate(job["steps"]):
            if "run" not in step or step.get("name") in skip or not self._holds(step.get("if")):
                continue
            environment = self._values({**job.get("env", {}), **step.get("env", {})})
            outputs = self._step(step["run"], folder, environment, f"{name}-{index}")
            for key, value in outputs.items():
                self._expressions[f"steps.{step.get('id')}.outputs.{key}"] = value
        for key, value in job.get("outputs", {}).items():
            self._expressions[f"needs.{name}.outputs.{key}"] = self._value(value)

    def _holds(self, condition: str | None) -> bool:
        if condition is None:
            return True
        match = CONDITION.fullmatch(condition)
        assert match is not None, condition
        return self._expressions.get(match["name"], "") == match["value"]

    def _step(self, script: str, folder: Path, environment: Mapping[str, str], name: str) -> dict[str, str]:
        assert EXPRESSION.search(script) is None, "a script takes values from its environment, where they can't be code"
        path = self._scratch / f"{name}.sh"
        path.write_text(script, encoding="utf-8")
        output, summary = self._scratch / f"{name}.output", self._scratch / f"{name}.summary"
        output.touch()
        summary.touch()
        files = {"GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(summary), "RUNNER_TEMP": str(self._scratch)}
        done = subprocess.run(
            [*SHELL, str(path)], cwd=folder, env={**os.environ, **self._environment, **environment, **files},
            capture_output=True, text=True, timeout=300, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self.log.append(f"$ {script}\n{done.stdout}{done.stderr}")
        assert done.returncode == 0, "\n".join(self.log)
        self.summary += summary.read_text(encoding="utf-8")
        return dict(line.split("=", 1) for line in output.read_text(encoding="utf-8").splitlines())

    def _values(self, given: Mapping[str, Any]) -> dict[str, str]:
        return {name: self._value(str(value)) for name, value in given.items()}

    def _value(self, text: str) -> str:
        return EXPRESSION.sub(lambda match: self._known(match[1]), text)

    def _known(self, name: str) -> str:
        unset = "" if name.startswith("steps.") else None
        value = self._expressions.get(name, unset)
        assert value is not None, f"{name} stands for nothing here"
        return value
