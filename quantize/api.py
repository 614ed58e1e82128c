"""The public functions: what `import quantize` offers, with the defaults that the command line has.

In: names and paths as people write them, and plain keywords. Out: the same objects that the commands work with. The
work is done by recipe, plan, build and rebuild; reports of progress go to a Reporter, and nowhere without one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quantize.build.execute import execute
from quantize.build.execution import RunOptions
from quantize.build.outcome import Outcome
from quantize.build.plan import Plan, confirm, make_plan, wanted
from quantize.build.rebuild import Given, Rebuild, rebuild_folders
from quantize.build.rebuild import rebuild as run_rebuild
from quantize.build.size import SizedPlan, size_plan
from quantize.events import Reporter, SilentReporter
from quantize.formats import option_models
from quantize.formats.base import RunLimits
from quantize.recipe.model import Recipe
from quantize.recipe.model import load_recipe as read_recipe
from quantize.store.artifact import Artifact
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache, default_cache_root
from quantize.system.lookup import find_recipe
from quantize.targets import find_artifact

PathText = str | os.PathLike[str]


def load_recipe(recipe: PathText) -> Recipe:
    """Read a recipe: a file by its path, or by name one in `recipes/` here or one that comes with the package.

    `notes` of the result says which was taken where the name could mean two.

    Raises errors.RecipeError: something in the file is wrong (file:line:column). errors.UsageError: no such recipe.
    """
    found = find_recipe(os.fspath(recipe))
    parsed = read_recipe(found.path, option_models())
    return replace(parsed, notes=(found.note, *parsed.notes)) if found.note else parsed


def plan(
    recipe: Recipe | PathText, *, store: Store | PathText | None = None, cache: PathText | None = None,
    threads: int | None = None, device: str = "cpu", memory_budget: int | str | None = None, evaluate: bool = True,
    reporter: Reporter | None = None,
) -> SizedPlan:  # fmt: skip
    """What a build would do: one job a variant, with its exact size in bytes, and the disk and memory that it takes.

    Reads headers and writes nothing into the store. A variant that can't be built has its `refusal`, no size. `build`
    takes the plan, here or, pickled, elsewhere.

    store: folder of the artifacts; by default $QUANTIZE_STORE, else artifacts/. cache: folder of the cache; by default
    $QUANTIZE_CACHE, else the user's. threads: by default one for each core. device: of pass and evaluation: cpu, or
    cuda[:N]. memory_budget: to stay under, in bytes, or such as "6GiB". evaluate: what is built is measured too.

    Raises errors.CheckpointError: the source is damaged or can't be had. errors.PlanError, errors.MissingExtraError,
    errors.UsageError; and what load_recipe raises.
    """
    limits = RunLimits.of(threads, device, memory_budget)
    workspace = _workspace(store, cache, reporter)
    return size_plan(make_plan(_recipe(recipe), workspace, evaluate=evaluate), workspace, limits)


def build(
    recipe: Plan | Recipe | PathText, *, only: Sequence[str] = (), force: bool = False, evaluate: bool = True,
    accept_risk: str | None = None, keep_going: bool = True, store: Store | PathText | None = None,
    cache: PathText | None = None, threads: int | None = None, device: str = "cpu",
    memory_budget: int | str | None = None, reporter: Reporter | None = None,
) -> list[Outcome]:  # fmt: skip
    """Build, verify and measure every variant that is not up to date, and hold the recipe's gates.

    recipe: what to build, or a plan of it, which is held against what is here now: another source, text or tool than
    was planned is refused, and what was built meanwhile is up to date.

    One Outcome a variant, in the recipe's order. A variant that failed, or that its gates refused, has its `error`
    there: it is not raised, and does not end the others.

    only: names of the variants to build; by default all. force: what is up to date too. evaluate: False measures
    nothing, and leaves what is built "not evaluated". accept_risk: the reason for which what the gates refuse is taken;
    it goes into the manifest. keep_going: False begins no other variant after a failure. The rest as for plan.

    Raises what stops all variants: as plan does, and errors.UsageError: `only` names no variant of the recipe.
    """
    run = RunOptions(RunLimits.of(threads, device, memory_budget), keep_going, accept_risk=accept_risk)
    workspace = _workspace(store, cache, reporter)
    if isinstance(recipe, Plan):
        chosen = wanted([job.variant for job in recipe.jobs], only)
        part = recipe.part(job for job in recipe.jobs if job.variant in chosen)
        changed = replace(part, force=force or part.force, evaluate=evaluate and part.evaluate)
        return execute(confirm(changed, workspace), workspace, run)
    plan = make_plan(_recipe(recipe), workspace, only=only, force=force, evaluate=evaluate)
    return execute(plan, workspace, run)


def rebuild(
    artifact: Artifact | PathText, *, source: PathText | None = None, calibration: PathText | None = None,
    keep: PathText | None = None, store: Store | PathText | None = None, cache: PathText | None = None,
    threads: int | None = None, device: str = "cpu", memory_budget: int | str | None = None,
    reporter: Reporter | None = None,
) -> Rebuild:  # fmt: skip
    """Build an artifact again from its manifest alone, in a scratch folder, and compare the two file by file.

    artifact: one of the store's as `name/variant`, `name/variant@digest` or the start of its digest, or its folder.
    source, calibration: where the model is, and the file of calibration text or the folder of several, if they are not
    found. keep: a new or empty folder to build into; by default the rebuilt files are removed when they are compared,
    and `rebuilt.folder` of the result is gone. The rest as for plan. Nothing in the store or the cache is used or
    changed.

    Raises errors.UsageError: no such artifact. errors.VerifyError: the artifact is damaged, or its source or text is
    another. errors.CheckpointError, errors.RecipeError: they are not found. errors.PlanError: no room for it.
    """
    found = artifact if isinstance(artifact, Artifact) else find_artifact(os.fspath(artifact), _store(store))
    given = Given(_path(source), _path(calibration))
    limits = RunLimits.of(threads, device, memory_budget)
    with rebuild_folders(_path(keep)) as (folder, work):
        return run_rebuild(found, folder, work, _workspace(store, cache, reporter), limits, given)


def _workspace(store: Store | PathText | None, cache: PathText | None, reporter: Reporter | None) -> Workspace:
    return Workspace(_store(store), _cache(cache), reporter or SilentReporter())


def _recipe(given: Recipe | PathText) -> Recipe:
    return given if isinstance(given, Recipe) else load_recipe(given)


def _store(given: Store | PathText | None) -> Store:
    return given if isinstance(given, Store) else Store(_path(given))


def _cache(given: PathText | None) -> Cache:
    return Cache(_path(given) or default_cache_root())


def _path(given: PathText | None) -> Path | None:
    return None if given is None else Path(given)
