"""An artifact's manifest -> the same artifact built again in a scratch folder, and what differs between the two.

In: an artifact; where its source and calibration text are, if the manifest's addresses do not lead to them. Out: a
Rebuild. Nothing but the manifest says what to build, and nothing that an earlier build left in the cache is used.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from quantize.build.disk import disk_free_bytes, disk_short
from quantize.build.execute import execute
from quantize.build.execution import RunOptions
from quantize.build.find_source import find_source
from quantize.build.job import VariantJob
from quantize.build.plan import Plan, identify_jobs
from quantize.build.rebuilt import (
    DeviceDifference,
    FileDifference,
    ToolDifference,
    device_difference,
    file_differences,
    manifest_differences,
    tool_differences,
)
from quantize.calibration.mix import CalibrationText
from quantize.calibration.writing import summarize_tokens
from quantize.errors import BuildError, DiskFullError, PlanError, RecipeError, StoreError, UsageError, VerifyError
from quantize.events import Event, EventKind, Reporter, note, status, warn
from quantize.formats import find_builder, recorded_options
from quantize.formats.base import RunLimits
from quantize.model.source import PinnedSource, open_source
from quantize.recipe.calibration import Calibration, calibration_of
from quantize.recipe.gates import GateLimits
from quantize.recipe.model import EvaluationSpec, Recipe, Source, Variant
from quantize.store.artifact import Artifact
from quantize.store.manifest import FILE_NAME, RECIPE_NAME, Manifest
from quantize.store.staging import store_errors
from quantize.store.store import Store
from quantize.store.verify import check_files
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.system.files import write_text
from quantize.system.lookup import CALIBRATION, DATA, find_path
from quantize.system.process import run_step
from quantize.system.processor import name_device

MORE_ROOM = "set TMPDIR, or name another folder with --keep; raise --memory-budget if you gave one"


@dataclass(frozen=True)
class Given:
    """Where things are that the manifest only names: the source; the file of calibration text, or a folder of files."""

    source: Path | None = None
    calibration: Path | None = None


@dataclass(frozen=True)
class Rebuild:
    """What came of it. fields: those of the manifest that differ, but for what other versions or another kind of device
    explain.

    folder: the rebuilt artifact. files: how many were compared.
    """

    artifact: Artifact
    rebuilt: Artifact
    tools: tuple[ToolDifference, ...]
    device: DeviceDifference | None
    fields: tuple[str, ...]
    differences: tuple[FileDifference, ...]
    files: int
    seconds: float

    @property
    def identical(self) -> bool:
        """Whether every file, and all that the manifest says but for tool versions and the device, is the same."""
        return not self.differences and not self.fields

    @property
    def same_digest(self) -> bool:
        """Whether the manifest is the same too."""
        return self.artifact.manifest.digest == self.rebuilt.manifest.digest


def rebuild(
    artifact: Artifact, folder: Path, work: Path, workspace: Workspace, limits: RunLimits, given: Given
) -> Rebuild:
    """Build an artifact again into the empty `folder`, working in the empty `work`, and compare.

    workspace: the user's, whose cache knows where files were; it is only asked, and nothing is built from it or into
    it. Raises VerifyError: the artifact is damaged, its source or text is another. CheckpointError, RecipeError: they
    are not found.
    """
    started, reporter, manifest = time.perf_counter(), workspace.reporter, artifact.manifest
    check_files(artifact, reporter)
    scratch = Workspace(Store(work / "store"), Cache(work / "cache"), _StepsOnly(reporter))
    plan = plan_of(artifact, scratch, work, workspace.cache, given)
    (job,) = plan.jobs
    _check_disk(manifest, plan.source, folder)
    tools = tool_differences(manifest.tools, job.tools)
    for item in tools:
        warn(reporter, job.name, f"{item.tool} is {item.here or 'not installed'}, it was {item.manifest or 'none'}")
    device = device_difference(manifest, _pass_device(manifest, limits, reporter))
    if device is not None:
        warn(reporter, job.name, f"{device}; its bytes may differ")
    _check_text(plan, artifact, scratch, limits)
    made = _taken(_executed(plan, scratch, limits), folder, manifest)
    note(reporter, job.name, f"rebuilt as {made.manifest.short_digest}")
    status(reporter, job.name, "comparing")
    device = device_difference(manifest, made.manifest.device)
    return Rebuild(
        artifact, made, tools, device, manifest_differences(manifest, made.manifest, other_versions=bool(tools)),
        file_differences(artifact, made), len(manifest.files), time.perf_counter() - started,
    )  # fmt: skip


@contextmanager
def rebuild_folders(keep: Path | None) -> Iterator[tuple[Path, Path]]:
    """The rebuilt artifact's folder, and one to work in; what is not kept is removed. Raises UsageError, StoreError."""
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise UsageError(f"{keep}: is there already", hint="name a folder that is new or empty")
    try:
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
        above = keep.absolute().parent if keep is not None else None
        scratch = Path(tempfile.mkdtemp(prefix=".quantize-rebuild-" if above else "quantize-rebuild-", dir=above))
    except OSError as exc:
        raise StoreError(f"no scratch folder: {exc.strerror} ({exc.filename})", hint="set TMPDIR, or --keep") from exc
    try:
        (scratch / "work").mkdir()
        (scratch / "artifact").mkdir()
        yield keep or scratch / "artifact", scratch / "work"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@dataclass(frozen=True)
class _StepsOnly:
    """Passes on what a build says, but for how it ended: that is only half of a rebuild."""

    reporter: Reporter

    def emit(self, event: Event) -> None:
        if event.kind not in {EventKind.DONE, EventKind.FAILED}:
            self.reporter.emit(event)


def plan_of(artifact: Artifact, scratch: Workspace, work: Path, known: Cache, given: Given) -> Plan:
    """The plan that an artifact's manifest stands for: its one variant, of its own source, whose figures are not asked.

    scratch: whose cache may be filled. work: for the recipe's folder. known: the cache that has seen files of this
    machine. Raises as rebuild does.
    """
    manifest = artifact.manifest
    variant = _variant(manifest)
    source = find_source(artifact, scratch.cache, scratch.reporter, given=given.source, known=known)
    recipe = _recipe(artifact, variant, work, given)
    return Plan(recipe, source, (_job(recipe, source, manifest),), evaluate=False)


def _variant(manifest: Manifest) -> Variant:
    return Variant(manifest.variant, manifest.format, recorded_options(manifest.format, manifest.format_options))


def _recipe(artifact: Artifact, variant: Variant, work: Path, given: Given) -> Recipe:
    """A recipe for this one variant, from the manifest; its own text only goes along, unread."""
    manifest = artifact.manifest
    (work / "recipe").mkdir()
    calibration = _calibration(artifact, work / "recipe", given.calibration)
    carried = artifact.folder / RECIPE_NAME
    text = carried.read_text(encoding="utf-8") if carried.is_file() else ""
    source = Source.model_validate({"model": manifest.source.uri})
    return Recipe(
        manifest.name, None, source, calibration, (variant,), EvaluationSpec(), GateLimits(),
        work / "recipe" / RECIPE_NAME, text,
    )  # fmt: skip


def _calibration(artifact: Artifact, folder: Path, given: Path | None) -> Calibration | None:
    """The spec of the manifest; local files of text are found and put under their own names into `folder`."""
    entry = artifact.manifest.calibration
    if entry is None:
        return None
    try:
        spec = calibration_of(entry.spec)
    except ValidationError as exc:
        raise VerifyError(f"{artifact.ref}: the manifest's calibration spec is not one that is known here") from exc
    ours = [dataset.spec.dataset for dataset in CalibrationText(spec, folder).datasets if dataset.is_users_file]
    paths = {name: _text_file(artifact, folder, name, given, alone=len(set(ours)) == 1) for name in ours}
    return spec.with_parts(
        [part.model_copy(update={"dataset": paths.get(part.dataset, part.dataset)}) for part in spec.parts]
    )


def _text_file(artifact: Artifact, folder: Path, name: str, given: Path | None, *, alone: bool) -> str:
    """A link in `folder` to the file of that name. given: it, if it is alone, or the folder that has them all.

    Raises VerifyError: no name of a file. RecipeError: it is not found.
    """
    if Path(name).name != name:
        raise VerifyError(f"{artifact.ref}: the manifest's calibration text {name!r} is no file name")
    bases = (artifact.folder, *artifact.folder.absolute().parents, *Path.cwd().parents, DATA / CALIBRATION)
    found = next((path for base in bases if (path := find_path(name, base)) is not None), None)
    if given is not None and given.is_dir():
        found = given / name
    elif given is not None and (alone or given.name == name):
        found = given
    if found is None or not found.is_file():
        where = "PATH" if alone else "FOLDER, the one that has all files of the mix"
        raise RecipeError(
            f"{artifact.ref}: its calibration text {given or name} is not found",
            hint=f"say where it is with --calibration {where}",
        )
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(found.resolve())
    return str(folder / name)


def _job(recipe: Recipe, source: PinnedSource, manifest: Manifest) -> VariantJob:
    """The job under the manifest's build key, if there is a way to it.

    The manifest says in which precision the pass ran, the build key what the recipe asked for: `auto`, or the same.
    """
    (job,) = identify_jobs(recipe, source, recipe.variants)
    if job.refusal is not None:
        raise job.refusal
    if job.build_key != manifest.build_key and recipe.calibration is not None:
        automatic = replace(recipe, calibration=recipe.calibration.model_copy(update={"precision": "auto"}))
        (other,) = identify_jobs(automatic, source, recipe.variants)
        return other if other.build_key == manifest.build_key else job
    return job


def _check_text(plan: Plan, artifact: Artifact, scratch: Workspace, limits: RunLimits) -> None:
    """Before the long work: is it the same text? The same build key says so already. Raises VerifyError."""
    entry, spec, (job,) = artifact.manifest.calibration, plan.recipe.calibration, plan.jobs
    if entry is None or spec is None or job.build_key == artifact.manifest.build_key:
        return
    checkpoint = open_source(plan.source, scratch.cache, scratch.reporter)
    found = summarize_tokens(spec, plan.recipe.path.parent, checkpoint, limits.device, scratch.reporter)
    if found.hash == entry.hash:
        return
    raise VerifyError(
        f"{artifact.ref}: the calibration text is not the one that it was built with: {found.tokens:,} tokens with the "
        f"hash {found.hash[:12]}, the manifest has {entry.tokens:,} with {entry.hash[:12]}",
        hint="`python-docs` needs the same CPython; name a file with --calibration; tokenizers differ by version",
    )


def _check_disk(manifest: Manifest, source: PinnedSource, folder: Path) -> None:
    """Artifact, dequantized source and what is made on the way all lie there at once. Raises PlanError."""
    copies = int(source.is_derived) + find_builder(manifest.format).source_copies
    needed, free = manifest.size_bytes + copies * manifest.source.weights_bytes, disk_free_bytes(folder)
    if needed > free:
        raise PlanError(disk_short(needed, free).message, hint=MORE_ROOM)


def _pass_device(manifest: Manifest, limits: RunLimits, reporter: Reporter) -> str | None:
    """The kind of device that a calibration pass here would run on, to tell before the long work; None: no pass."""
    if manifest.calibration is None or manifest.device is None:
        return None
    return run_step("looking at the processor", reporter, name_device, limits.device)


def _executed(plan: Plan, scratch: Workspace, limits: RunLimits) -> Artifact:
    """What the plan gives, in the scratch store. Raises what ended the build."""
    try:
        (outcome,) = execute(plan, scratch, RunOptions(limits, judge=False))
    except PlanError as exc:
        raise PlanError(exc.message, hint=MORE_ROOM) from exc
    if outcome.artifact is not None:
        return outcome.artifact
    error = outcome.error or BuildError(f"{outcome.variant}: {outcome.state}")
    if isinstance(error, DiskFullError):
        error.hint = MORE_ROOM
    raise error


def _taken(made: Artifact, folder: Path, wanted: Manifest) -> Artifact:
    """The artifact moved into a folder; the accepted risk is a person's word, and is taken over. Raises StoreError."""
    manifest = made.manifest.with_risk(wanted.accepted_risk)
    with store_errors(folder):
        for path in made.folder.iterdir():
            shutil.move(path, folder / path.name)
        write_text(folder / FILE_NAME, manifest.to_json())
    return Artifact(folder, manifest)
