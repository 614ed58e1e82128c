"""The tasks that lm-evaluation-harness has itself, by name: where each one's file is, without loading the harness.

In: a name. Out: a path; an error that says what the name is instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from quantize.errors import MissingExtraError, RecipeError
from quantize.evaluate.task_files import DISTRIBUTION, EXTRA, HARNESS, PinnedTask, harness_version


def check_names(tasks: Sequence[PinnedTask]) -> None:
    """Raises RecipeError: the harness has no task of a name, or it is a group. MissingExtraError."""
    for task in tasks:
        if not task.file:
            find_own(task.entry.label)


def find_own(name: str) -> Path:
    """The file of a task of the harness's own. Raises RecipeError: there is none. MissingExtraError."""
    spec = find_spec(DISTRIBUTION)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(f"`evaluation: tasks` ({HARNESS})", EXTRA)
    line = re.compile(rf"^task:[ \t]*['\"]?{re.escape(name)}['\"]?[ \t]*(#.*)?$", re.MULTILINE)
    paths = sorted((Path(spec.submodule_search_locations[0]) / "tasks").rglob("*.yaml"))
    path = next((item for item in paths if line.search(item.read_text(encoding="utf-8"))), None)
    if path is None:
        raise _unknown(name, paths)
    return path


def _unknown(name: str, paths: list[Path]) -> RecipeError:
    texts = [path.read_text(encoding="utf-8") for path in paths]
    groups = re.compile(
        rf"^(group:[ \t]*|tag:[ \t]*|tag:\n(?:[ \t]*- .*\n)*?[ \t]*- )['\"]?{re.escape(name)}['\"]?[ \t]*$",
        re.MULTILINE,
    )
    if any(groups.search(text) for text in texts):
        message = f"`tasks`: {name} is a group of tasks of {HARNESS}, each with figures of its own"
        return RecipeError(message, hint="name the tasks of it that you mean, each with its revision")
    known = {found for text in texts for found in re.findall(r"^task:[ \t]*['\"]?([\w./:+-]+)", text, re.MULTILINE)}
    near = get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
    return RecipeError(f"`tasks`: {HARNESS} {harness_version()} has no task {name}", hint=hint)
