"""Plan -> Artifacts: the only module that wires the steps together.

In: a recipe, a store, a cache, how to run. Out: one Outcome a variant. One variant's failure does not end the others.
Order: pin the source, skip what is built, one calibration pass for all that need it, then build, verify and commit.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantize.artifact import (
    SCRATCH,
    Artifact,
    commit,
    describe_files,
    settle,
    staging_folder,
    variant_lock,
    write_measurements,
    write_text,
)
from quantize.backends.base import BuildResult, Context, Limits
from quantize.cache import Cache
from quantize.card import render_card
from quantize.checkpoint import CARRIED_FILES, Checkpoint
from quantize.errors import QuantizeError
from quantize.estimate import manifest_estimate
from quantize.manifest import (
    CARD_NAME,
    MEASUREMENTS_NAME,
    RECIPE_NAME,
    SCHEMA_VERSION,
    CalibrationEntry,
    FileEntry,
    KeptEntry,
    Manifest,
    SourceEntry,
)
from quantize.plan import Job, identify_jobs
from quantize.recipe import Recipe
from quantize.report import Event, Reporter, note, status, warn
from quantize.shape import ModelShape
from quantize.source import PinnedSource, open_source, pin_source
from quantize.store import Store


@dataclass(frozen=True)
class RunOptions:
    """How to run; nothing here changes what is built."""

    limits: Limits = field(default_factory=Limits)
    keep_going: bool = True
    force: bool = False
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of one variant: "built", "up to date", "failed" or "skipped"."""

    variant: str
    state: str
    artifact: Artifact | None = None
    error: QuantizeError | None = None
    seconds: float = 0.0


@dataclass
class _Work:
    """One variant on its way: its job and the folders that it holds."""

    job: Job
    context: Context
    started: float


class _Build:
    """One run over one recipe; keeps what all its steps share."""

    def __init__(self, recipe: Recipe, store: Store, cache: Cache, reporter: Reporter, run: RunOptions) -> None:
        self.recipe, self.store, self.cache, self.reporter, self.run = recipe, store, cache, reporter, run
        self.source: PinnedSource = pin_source(recipe, cache, reporter)
        self.outcomes: dict[str, Outcome] = {}
        self.checkpoint: Checkpoint

    def all(self) -> list[Outcome]:
        if self.recipe.gates is not None:
            warn(self.reporter, "", "the recipe has `gates`; this version measures none of them, so none is held")
        jobs = self._wanted(identify_jobs(self.recipe, self.source, self.store))
        todo = [job for job in jobs if job.existing is None or self.run.force]
        for job in jobs:
            if job not in todo and job.existing is not None:
                settle(self.store.root, job.existing)
                self._finished(Outcome(job.variant.name, "up to date", job.existing))
        if todo:
            self.checkpoint = open_source(self.source, self.cache, self.reporter)
            todo = [job for job in todo if self._checked(job)]
            self._build_calibrated([job for job in todo if job.backend.needs_calibration(job.variant.options)])
            for job in todo:
                if not job.backend.needs_calibration(job.variant.options) and self._goes_on(job):
                    with ExitStack() as held:
                        if (work := self._open_work(job, held)) is not None:
                            self._build_one(work)
        return [self.outcomes[job.variant.name] for job in jobs]

    def _wanted(self, jobs: list[Job]) -> list[Job]:
        return [job for job in jobs if not self.run.only or job.variant.name in self.run.only]

    def _goes_on(self, job: Job) -> bool:
        if self.run.keep_going or not any(item.error for item in self.outcomes.values()):
            return True
        self._finished(Outcome(job.variant.name, "skipped"))
        return False

    def _checked(self, job: Job) -> bool:
        try:
            job.backend.check(self.checkpoint, job.variant.options)
        except QuantizeError as exc:
            self._finished(Outcome(job.variant.name, "failed", error=exc))
            return False
        return True

    def _open_work(self, job: Job, held: ExitStack) -> _Work | None:
        """Take the variant's lock and a staging folder; None if another build made it while we waited."""
        name = job.variant.name
        held.enter_context(variant_lock(self.store.root, self.recipe.name, name))
        existing = self.store.find_build(self.recipe.name, name, job.build_key)
        if existing is not None and not self.run.force:
            note(self.reporter, name, "another build has just made it")
            self._finished(Outcome(name, "up to date", existing))
            return None
        staging = held.enter_context(staging_folder(self.store.root, self.recipe.name, name))
        scratch = staging.with_name(staging.name + SCRATCH)
        scratch.mkdir()
        held.callback(shutil.rmtree, scratch, ignore_errors=True)
        context = Context(
            name, job.variant.options, self.source, self.checkpoint, self.cache, staging, scratch, self.run.limits
        )
        return _Work(job, context, time.perf_counter())

    def _build_calibrated(self, jobs: Sequence[Job]) -> None:
        """All calibrated variants of the recipe, from one pass over the blocks."""
        if not jobs:
            return
        with ExitStack() as held:
            works = []
            for job in sorted(jobs, key=lambda item: item.variant.name):  # one order, so that two builds can't deadlock
                if (work := self._open_work(job, held)) is not None:
                    works.append(work)
            if works:
                self._run_pass(works)

    def _run_pass(self, works: list[_Work]) -> None:
        from quantize.calibrated import run_pass

        try:
            passed = run_pass(self.recipe, [(item.job.backend.name, item.context) for item in works], self.reporter)
        except QuantizeError as exc:
            for work in works:
                self._finished(Outcome(work.context.variant, "failed", error=exc))
            return
        for work in works:
            error = passed.errors.get(work.context.variant)
            if error is not None:
                self._finished(Outcome(work.context.variant, "failed", error=error))
            elif self._goes_on(work.job):
                work.context = replace(work.context, calibration=passed.entry)
                self._build_one(work, {"calibration_pass": passed.measurements})

    def _build_one(self, work: _Work, measured: dict[str, Any] | None = None) -> None:
        job, context = work.job, work.context
        try:
            result = job.backend.build(context, self.reporter)
            facts = job.backend.verify(context.staging, self.checkpoint, self.run.limits, self.reporter)
            status(self.reporter, context.variant, "hashing and writing the manifest")
            seconds = time.perf_counter() - work.started
            artifact = self._commit(work, result, {**(measured or {}), "verify": dict(facts)}, seconds)
        except QuantizeError as exc:
            self._finished(Outcome(context.variant, "failed", error=exc, seconds=time.perf_counter() - work.started))
            return
        self._finished(Outcome(context.variant, "built", artifact, seconds=seconds))

    def _commit(self, work: _Work, result: BuildResult, measured: dict[str, Any], seconds: float) -> Artifact:
        staging = work.context.staging
        names = (*result.files, *self._carry_papers(staging))
        files = describe_files(staging, tuple(dict.fromkeys(names)))
        manifest = self._manifest(work.job, result, files, work.context.calibration)
        write_text(staging / RECIPE_NAME, self.recipe.text)
        write_text(staging / CARD_NAME, render_card(manifest))
        measurements = {
            "built_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "build_seconds": round(seconds, 2),
            "machine": {
                "system": platform.system(),
                "processor": platform.machine(),
                "threads": self.run.limits.threads,
            },
            **measured,
            **result.measurements,
        }
        write_measurements(staging, measurements)
        return commit(self.store.root, staging, manifest)

    def _carry_papers(self, staging: Path) -> list[str]:
        """Copy the licence files of the base model: they must go wherever its weights go."""
        names = []
        for pattern in CARRIED_FILES:
            for path in sorted(self.checkpoint.folder.glob(pattern)):
                if path.is_file():
                    shutil.copyfile(path, staging / path.name)
                    names.append(path.name)
        return names

    def _manifest(
        self, job: Job, result: BuildResult, files: tuple[FileEntry, ...], calibration: CalibrationEntry | None
    ) -> Manifest:
        source, checkpoint = self.source, self.checkpoint
        return Manifest(
            schema_version=SCHEMA_VERSION,
            name=self.recipe.name,
            variant=job.variant.name,
            format=job.variant.format,
            options=job.variant.normalized(),
            bits=result.bits,
            group_size=result.group_size,
            bits_per_weight=result.bits_per_weight,
            source=SourceEntry(
                uri=source.uri,
                revision=source.revision,
                name=source.name,
                base_model=source.base_model,
                license=source.license,
                architecture=checkpoint.architecture,
                parameters=checkpoint.parameters,
                weights_bytes=checkpoint.weights_bytes,
                quantized_before=source.quantized_before,
                files=tuple(
                    FileEntry(path=item.path, size_bytes=item.size_bytes, sha256=item.sha256) for item in source.files
                ),
            ),
            calibration=calibration,
            tools=job.tools,
            files=files,
            kept_in_high_precision=tuple(
                KeptEntry(tensor=item.tensor, type=item.type, reason=item.reason) for item in result.kept
            ),
            size_bytes=sum(item.size_bytes for item in files),
            estimate=dict(
                manifest_estimate(
                    ModelShape.from_config(checkpoint.config), result.weights_bytes, format=job.variant.format
                )
            ),
            build_key=job.build_key,
        ).sealed()

    def _finished(self, outcome: Outcome) -> None:
        self.outcomes[outcome.variant] = outcome
        if outcome.error is not None:
            self.reporter.emit(Event("failed", outcome.variant, str(outcome.error)))
        elif outcome.state == "skipped":
            warn(self.reporter, outcome.variant, "skipped: another variant failed")
        else:
            where = f": {outcome.artifact.folder}" if outcome.artifact else ""
            self.reporter.emit(Event("done", outcome.variant, f"{outcome.state}{where}"))


def build(
    recipe: Recipe, store: Store, cache: Cache, reporter: Reporter, run: RunOptions | None = None
) -> list[Outcome]:
    """Build every variant of a recipe that is not up to date.

    Raises CheckpointError, PlanError, MissingExtraError for what stops all of them; the rest is in the outcomes.
    """
    run = run or RunOptions()
    unknown = sorted(set(run.only) - {variant.name for variant in recipe.variants})
    if unknown:
        from quantize.errors import UsageError

        names = ", ".join(variant.name for variant in recipe.variants)
        raise UsageError(f"the recipe has no variant {unknown[0]!r}", hint=f"it has: {names}")
    return _Build(recipe, store, cache, reporter, replace(run)).all()


__all__ = ["MEASUREMENTS_NAME", "Outcome", "RunOptions", "build"]
