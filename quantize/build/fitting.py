"""What should be built so that it fits a card or a size: an answer without a build.

In: a recipe, what must fit. Out: a FitAnswer for each variant that asks, or for the one question of a command. What
types cost is taken from artifacts of the same source, if one was built with `fit`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.build.disk import temporary_root
from quantize.build.plan import Plan
from quantize.errors import UsageError
from quantize.formats import find_format, formats
from quantize.formats.base import Context, RunLimits
from quantize.formats.format import FitAnswer, Format
from quantize.model.source import open_headers
from quantize.store.workspace import Workspace


@dataclass(frozen=True)
class Answered:
    """name: of the variant, or what a recipe may call it. options: as a recipe says it."""

    name: str
    options: Mapping[str, Any]
    answer: FitAnswer


def answer_fit(plan: Plan, asked: Mapping[str, Any], workspace: Workspace, limits: RunLimits) -> list[Answered]:
    """For what is asked, or for each variant of the recipe that must fit if nothing is.

    Raises UsageError: no variant must fit, or what is asked can't be meant, or nothing is small enough.
    """
    questions = _questions(plan, asked)
    built = [
        item.folder
        for item in workspace.store.current_artifacts(plan.recipe.name)
        if {entry.sha256 for entry in item.manifest.source.files} == {entry.sha256 for entry in plan.source.files}
    ]
    with tempfile.TemporaryDirectory(prefix="quantize-fit-", dir=temporary_root()) as scratch:
        folder = Path(scratch)
        checkpoint = open_headers(plan.source, workspace.cache, folder / "checkpoint", workspace.reporter)
        found = []
        for name, form, options in questions:
            context = Context(name, options, plan.source, checkpoint, workspace.cache, folder, folder, limits)
            assert form.fitter is not None
            answer = form.fitter.answer(context, built, workspace.reporter)
            found.append(Answered(name, options.model_dump(mode="json"), answer))
    return found


def _questions(plan: Plan, asked: Mapping[str, Any]) -> list[tuple[str, Format, Any]]:
    fitting = [item for item in formats().values() if item.fitter is not None]
    if asked:
        wanted: list[tuple[str, Format, Any]] = []
        for form in fitting:
            assert form.fitter is not None
            beside = [job.variant.options for job in plan.jobs if job.variant.format == form.name]
            options = form.fitter.options(asked, beside)
            wanted.append((options.variant_name(), form, options))
        return wanted
    names = {item.name for item in fitting}
    jobs = [job for job in plan.jobs if job.variant.format in names and getattr(job.variant.options, "fit", None)]
    if not jobs:
        raise UsageError("no variant of the recipe has `fit`", hint="give --gpu, --vram, --size or --bits")
    return [(job.name, find_format(job.variant.format), job.variant.options) for job in jobs]
