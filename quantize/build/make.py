"""One variant: its lock and the folders that it works in, the builder, verification, the papers.

In: a job of an execution. Out: a complete artifact, set aside until it is settled. The calibration pass before it, and
what becomes of the artifact, are left to execute.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from quantize.build.assemble import Made, assemble
from quantize.build.execution import Execution
from quantize.build.job import VariantJob
from quantize.build.plan import CHECKS
from quantize.build.verification import Verification, verify
from quantize.errors import VerifyError
from quantize.events import status, warn
from quantize.formats import find_format
from quantize.formats.base import Context
from quantize.store.artifact import UNJUDGED, Artifact, keep_only, set_aside
from quantize.store.staging import store_errors, workplace


@dataclass(frozen=True)
class Work:
    """One variant on its way: its job, what its builder is given, and when it began."""

    job: VariantJob
    context: Context
    started: float

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.started


@dataclass(frozen=True)
class Complete:
    """What was made, aside. failure: why verification refuses it."""

    artifact: Artifact
    failure: VerifyError | None
    seconds: float


@contextmanager
def working(job: VariantJob, at: Execution) -> Iterator[Work]:
    """Folders for a job, with what a stopped build left to go on from. Only call under its variant's lock.

    Raises StoreError.
    """
    plan = at.plan
    with workplace(at.root, plan.recipe.name, job.name, job.inputs, anew=plan.force) as place:
        if place.changed:
            text = f"the stopped build is of no use, it starts over: {'; '.join(place.changed)}"
            warn(at.workspace.reporter, job.name, text)
        context = Context(
            job.name, job.variant.options, plan.source, at.checkpoint, at.workspace.cache, place.staging,
            place.scratch, at.run.limits,
        )  # fmt: skip
        yield Work(job, context, time.perf_counter())


def make(work: Work, at: Execution, measured: Mapping[str, Any]) -> Complete:
    """Build, verify and describe. measured: on the way so far, for measurements.json.

    Raises what a builder raises; StoreError.
    """
    job, context, reporter = work.job, work.context, at.workspace.reporter
    with store_errors(at.root):
        result = job.builder.build(context, reporter)
    facts, failure = _verified(work, at)
    status(reporter, job.name, "hashing and writing the manifest")
    seconds = work.seconds
    with store_errors(at.root):
        manifest = assemble(at.plan.recipe, job, context, Made(result, {**measured, **facts}, seconds))
        keep_only(context.staging, manifest)
    return Complete(set_aside(at.root, context.staging, manifest, UNJUDGED), failure, seconds)


def _verified(work: Work, at: Execution) -> tuple[dict[str, Any], VerifyError | None]:
    """What verification found out, or why it refuses; nothing where the run is not to judge."""
    if not at.run.judge:
        return {}, None
    job, context = work.job, work.context
    checks = find_format(job.variant.format).checks
    try:
        asked = Verification(job.variant.format, job.builder, context.staging, at.checkpoint)
        facts = verify(asked, context.limits, at.workspace.reporter)
    except VerifyError as exc:
        return {"verify": {}, CHECKS: checks}, exc
    return {"verify": facts, CHECKS: checks}, None
