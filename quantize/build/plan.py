"""Recipe x source -> Plan: what is to be made of what, under which build keys, and what is there already.

In: a recipe, a store, a cache. Out: a Plan with one VariantJob a variant: plain data, which execute runs, here or
elsewhere, and a lock pins. Reads no weights and writes nothing into the store; sizes are left to size.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from quantize import __version__
from quantize.build.job import VariantJob, no_calibration
from quantize.build.outdated import outdated
from quantize.calibration.mix import CalibrationText
from quantize.errors import PlanError, UsageError
from quantize.evaluate.decision import RUNS
from quantize.evaluate.record import read_record
from quantize.evaluate.task_files import pin_tasks
from quantize.evaluate.task_names import check_names
from quantize.events import Reporter, note
from quantize.formats import builders, find_format, known_format
from quantize.formats.base import Builder
from quantize.model.source import PinnedSource, pin_path, pin_source
from quantize.recipe.model import DEFAULT_TEXT, Recipe, Variant
from quantize.store.artifact import Artifact
from quantize.store.manifest import OWN, tool_versions
from quantize.store.staging import differences
from quantize.store.store import Store
from quantize.store.workspace import Workspace

BUILD_KEY_VERSION = 2
CHECKS = "checks"  # in measurements.json: Format.checks of what verified the artifact


@dataclass(frozen=True)
class Plan:
    """What is to be made, and of what. It can be printed, pickled, and run by another process or machine.

    recipe: with its source and its calibration text at commits. jobs: one for each variant that is wanted. force: what
    is there already is made again. evaluate: what has no figures is measured.
    """

    recipe: Recipe
    source: PinnedSource
    jobs: tuple[VariantJob, ...]
    force: bool = False
    evaluate: bool = True

    @property
    def todo(self) -> tuple[VariantJob, ...]:
        """Jobs that are neither built nor refused."""
        return tuple(job for job in self.jobs if job.is_open)

    @property
    def calibrated(self) -> tuple[VariantJob, ...]:
        """Jobs that share one calibration pass."""
        return tuple(job for job in self.jobs if job.is_calibrated)

    @property
    def measured(self) -> tuple[VariantJob, ...]:
        """Jobs that are held to the recipe's gates by figures of their own."""
        return tuple(job for job in self.jobs if self.evaluate and job.is_measurable)

    def part(self, jobs: Iterable[VariantJob]) -> Plan:
        """The same plan, without sizes, for some of its jobs."""
        return Plan(self.recipe, self.source, tuple(jobs), self.force, self.evaluate)

    def to_data(self) -> dict[str, Any]:
        """Plain JSON data, for people and programs."""
        return {
            "recipe": self.recipe.name,
            "source": {"uri": self.source.uri, "sha256": self.source.digest},
            "calibrated_together": [job.name for job in self.calibrated],
            "measured": [job.name for job in self.measured],
            "variants": [_job_data(job) for job in self.jobs],
        }


def _job_data(job: VariantJob) -> dict[str, Any]:
    size = job.size
    return {
        "name": job.name,
        "format": job.variant.format,
        "options": job.variant.normalized(),
        "build_key": job.build_key,
        "up_to_date": job.is_up_to_date,
        "file_bytes": size.file_bytes if size else None,
        "weights_bytes": size.weights_bytes if size else None,
        "bits_per_weight": size.bits_per_weight if size else None,
        "at_most": size.at_most if size else None,
        "notes": list(size.notes) if size else [],
        "tensors": size.tensors if size else None,
        "refusal": str(job.refusal) if job.refusal else None,
    }


def make_plan(
    recipe: Recipe, workspace: Workspace, *, only: Collection[str] = (), force: bool = False, evaluate: bool = True
) -> Plan:
    """Pin a recipe's source and text, make its build keys, and look what the store has. only: variants; all if empty.

    Raises CheckpointError, PlanError, MissingExtraError; UsageError: a variant that is not in the recipe; RecipeError:
    a task that is none, where it is to be measured.
    """
    variants = wanted(recipe.variants, only)
    recipe = pin_calibration(recipe, workspace.reporter)
    source = pin_source(recipe, workspace.cache, workspace.reporter)
    if source.revision is not None:
        at_commit = recipe.source.model_copy(update={"revision": source.revision})
        recipe = replace(recipe, source=at_commit)
    if evaluate:
        check_names(pin_tasks(recipe.evaluation.tasks, recipe.path, workspace.cache))
    plan = look(Plan(recipe, source, identify_jobs(recipe, source, variants), force, evaluate), workspace.store)
    say_outdated(plan, workspace)
    return plan


def wanted(variants: Sequence[Variant], only: Collection[str]) -> tuple[Variant, ...]:
    """Those of these names, in their order; all if none is named. Raises UsageError: there is none of a name."""
    unknown = sorted(set(only) - {variant.name for variant in variants})
    if unknown:
        names = ", ".join(variant.name for variant in variants)
        raise UsageError(f"the recipe has no variant {unknown[0]!r}", hint=f"it has: {names}")
    return tuple(variant for variant in variants if not only or variant.name in only)


def look(plan: Plan, store: Store) -> Plan:
    """The plan with what the store has now: other builds may have finished since it was made."""
    return plan.part(replace(job, existing=find_existing(plan, job, store)) for job in plan.jobs)


def find_existing(plan: Plan, job: VariantJob, store: Store) -> Artifact | None:
    """The build that stands for a job: a good one, or one that was refused or has no figures yet.

    One that did not even run stands for it only as long as nothing is checked otherwise, and any only as long as it
    would be made so today.
    """
    if plan.force or not job.build_key:
        return None
    wanted = (plan.recipe.name, job.name, job.build_key)
    aside = (item for item in store.find_aside(*wanted) if not is_refused_by_others(item))
    found = chain(store.find_builds(*wanted), aside)
    return next((item for item in found if not outdated(item, plan.source)), None)


def say_outdated(plan: Plan, workspace: Workspace) -> None:
    """Name the builds that are there and do not stand for their jobs, and why."""
    for job in () if plan.force else plan.todo:
        found = workspace.store.find_build(plan.recipe.name, job.name, job.build_key)
        if found is not None:
            why = outdated(found, plan.source)
            note(workspace.reporter, job.name, f"{found.manifest.short_digest} is of an earlier version ({why}): "
                 "it is built again")  # fmt: skip


def is_refused_by_others(artifact: Artifact) -> bool:
    """Whether an artifact did not load or run by another version of this program, or of its format's checks."""
    measured, manifest = artifact.measurements(), artifact.manifest
    record = read_record(measured)
    if record is None or all(finding.gate != RUNS for finding in record.decision.refusals):
        return False
    return (manifest.tools.get(OWN), measured.get(CHECKS, 1)) != (__version__, known_format(manifest.format).checks)


def confirm(plan: Plan, workspace: Workspace) -> Plan:
    """A plan that was made earlier, or on another machine, held against what is here now, with its source as it lies
    here. What the store has, `execute` looks up.

    Raises PlanError: the source, the text or a tool is another. CheckpointError: the source is not here.
    """
    cache, reporter = workspace.cache, workspace.reporter
    beside, location = plan.source.beside, plan.source.location
    is_here = all(path is None or path.exists() for path in (location, beside.tokenizer, beside.adapter))
    found = pin_path(location, cache, reporter, beside) if is_here else pin_source(plan.recipe, cache, reporter)
    hint = "plan again: what is built is what was planned"
    if found.digest != plan.source.digest:
        raise PlanError(f"the source {plan.source.uri} is not what the plan was made of", hint=hint)
    source = replace(plan.source, location=found.location, mending=found.mending)
    jobs = identify_jobs(plan.recipe, source, [job.variant for job in plan.jobs])
    for planned, job in zip(plan.jobs, jobs, strict=True):
        if planned.inputs != job.inputs:
            changed = "; ".join(differences(planned.inputs, job.inputs))
            raise PlanError(f"{job.name} is not what was planned: {changed}", hint=hint)
    return Plan(plan.recipe, source, jobs, plan.force, plan.evaluate)


def pin_calibration(recipe: Recipe, reporter: Reporter) -> Recipe:
    """The recipe with its calibration datasets at commits, if a variant needs them. Raises as Dataset.pin does."""
    if recipe.calibration is None or not any(
        builders()[item.format].needs_calibration(item.options) for item in recipe.variants
    ):
        return recipe
    if recipe.names_no_text:
        note(reporter, "", f"the recipe names no calibration text: `{DEFAULT_TEXT}` is taken")
    return replace(recipe, calibration=CalibrationText(recipe.calibration, recipe.path.parent).pin(reporter))


def identify_jobs(recipe: Recipe, source: PinnedSource, variants: Iterable[Variant]) -> tuple[VariantJob, ...]:
    """Jobs with their build keys; reads no weights and starts no process.

    A job without a key has a refusal: it needs calibration, and the recipe has none.
    """
    jobs = []
    for variant in variants:
        builder = builders()[variant.format]
        tools = tool_versions(builder.tools(variant.options))
        try:
            jobs.append(VariantJob(variant, _inputs(recipe, source, variant, builder, tools), tools))
        except PlanError as exc:
            jobs.append(VariantJob(variant, {}, tools, refusal=exc))
    return tuple(jobs)


def _inputs(
    recipe: Recipe, source: PinnedSource, variant: Variant, builder: Builder[Any], tools: dict[str, str]
) -> dict[str, Any]:
    calibration: Any = None
    if builder.needs_calibration(variant.options):
        if recipe.calibration is None:
            raise no_calibration(variant.name)
        calibration = CalibrationText(recipe.calibration, recipe.path.parent).identify()
    return {
        "version": BUILD_KEY_VERSION,
        "name": source.name,
        "uri": source.uri,
        "license": source.license,
        "base_model": source.base_model,
        "source": source.digest,
        "variant": variant.normalized(),
        "calibration": calibration,
        "tools": {name: version for name, version in tools.items() if name != OWN},
        "revision": find_format(variant.format).revision,
    }
