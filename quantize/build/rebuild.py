"""An artifact's manifest -> the same artifact built again in a scratch folder, and what differs between the two.

In: an artifact; where its source and calibration text are, if the manifest's addresses do not lead to them. Out: a
Rebuild. Nothing but the manifest says what to build, and nothing that an earlier build left in the cache is used.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quantize.build.assemble import Made, assemble
from quantize.build.calibrate import run_pass
from quantize.build.disk import disk_free_bytes, disk_short
from quantize.build.find_source import find_source
from quantize.build.job import VariantJob
from quantize.build.plan import identify_jobs
from quantize.calibration.datasets import find_dataset
from quantize.calibration.text import summarize_tokens
from quantize.errors import PlanError, RecipeError, StoreError, UsageError, VerifyError
from quantize.events import Reporter, note, status, warn
from quantize.files.compare import TensorDifference, compare_metadata, compare_weights
from quantize.formats import builders, find_format
from quantize.formats.base import Context, RunLimits
from quantize.model.checkpoint import Checkpoint
from quantize.model.source import PinnedSource, open_source
from quantize.recipe.gates import GateLimits
from quantize.recipe.model import CalibrationSpec, EvaluationSpec, Recipe, Source, Variant
from quantize.store.artifact import Artifact
from quantize.store.manifest import FILE_NAME, RECIPE_NAME, FileEntry, Manifest
from quantize.store.store import Store
from quantize.store.verify import check_files
from quantize.system.cache import Cache
from quantize.system.files import write_text
from quantize.system.lookup import CALIBRATION, DATA, find_path
from quantize.system.process import run_step
from quantize.system.processor import name_device

DECIDED_LATER = ("files", "accepted_risk", "device")  # fields of a manifest that are not compared by themselves
OF_VERSIONS = ("tools", "build_key")  # those that differ wherever versions do
TEXT_BYTES = 32 << 20  # a file up to this is looked into for the first byte that differs


@dataclass(frozen=True)
class Given:
    """Where things are that the manifest only names: the source, the file of calibration text."""

    source: Path | None = None
    calibration: Path | None = None


@dataclass(frozen=True)
class ToolDifference:
    """A version that is not the manifest's; here is None where it is not installed."""

    tool: str
    manifest: str | None
    here: str | None


@dataclass(frozen=True)
class DeviceDifference:
    """The kind of device that the manifest names, and another one that is here: the same work may give other bits."""

    manifest: str
    here: str

    def __str__(self) -> str:
        return f"made on another kind of processor: {self.manifest} there, {self.here} here"


@dataclass(frozen=True)
class FileDifference:
    """A file that is not the same: in words, and by tensor where it holds any."""

    path: str
    what: str
    tensors: tuple[TensorDifference, ...] = ()


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
    artifact: Artifact, folder: Path, work: Path, known: Cache, reporter: Reporter, limits: RunLimits, given: Given
) -> Rebuild:
    """Build an artifact again into the empty `folder`, working in the empty `work`, and compare.

    known: the user's cache, which knows where files were; only asked, never built from. Raises VerifyError: the
    artifact is damaged, its source or text is another. CheckpointError, RecipeError: they are not found.
    """
    started = time.perf_counter()
    check_files(artifact, reporter)
    cache, manifest = Cache(work / "cache"), artifact.manifest
    variant = _variant(manifest)
    source = find_source(artifact, cache, reporter, given=given.source, known=known)
    _check_disk(manifest, source, folder)
    recipe = _recipe(artifact, variant, work, given)
    job, recipe = _job(recipe, source, manifest, Store(work / "store"))
    tools = _tool_differences(manifest.tools, job.tools)
    for item in tools:
        warn(reporter, variant.name, f"{item.tool} is {item.here or 'not installed'}, it was {item.manifest or 'none'}")
    device = _device_difference(manifest, _pass_device(manifest, limits, reporter))
    if device is not None:
        warn(reporter, variant.name, f"{device}; its bytes may differ")
    checkpoint = open_source(source, cache, reporter)
    _check_text(recipe, job, artifact, checkpoint, reporter)
    scratch = work / "scratch"
    scratch.mkdir()
    context = Context(variant.name, variant.options, source, checkpoint, cache, folder, scratch, limits)
    rebuilt = Artifact(folder, _build(recipe, job, context, manifest, reporter))
    status(reporter, variant.name, "comparing")
    device = _device_difference(manifest, rebuilt.manifest.device)
    return Rebuild(
        artifact, rebuilt, tools, device, _fields(manifest, rebuilt.manifest, OF_VERSIONS if tools else ()),
        tuple(_differences(artifact, rebuilt)), len(manifest.files), time.perf_counter() - started,
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


def _variant(manifest: Manifest) -> Variant:
    if manifest.format not in builders():
        hint = f"install the plugin that brings it; installed are: {', '.join(builders())}"
        raise PlanError(f"the format {manifest.format!r} is not installed here", hint=hint)
    options = {key: value for key, value in manifest.options.items() if key != "format"}
    try:
        parsed = builders()[manifest.format].Options.model_validate(options)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise VerifyError(f"the manifest's option `{where}` is not one that {manifest.format} has here") from exc
    return Variant(manifest.variant, manifest.format, parsed)


def _recipe(artifact: Artifact, variant: Variant, work: Path, given: Given) -> Recipe:
    """A recipe for this one variant, from the manifest; its own text only goes along, unread."""
    manifest = artifact.manifest
    (work / "recipe").mkdir()
    calibration = _calibration(artifact, work / "recipe", given.calibration)
    carried = artifact.folder / RECIPE_NAME
    text = carried.read_text(encoding="utf-8") if carried.is_file() else ""
    source = Source(model=manifest.source.uri, revision=None, name=None, base_model=None, license=None)
    return Recipe(
        manifest.name, None, source, calibration, (variant,), EvaluationSpec(), GateLimits(),
        work / "recipe" / RECIPE_NAME, text,
    )  # fmt: skip


def _calibration(artifact: Artifact, folder: Path, given: Path | None) -> CalibrationSpec | None:
    """The spec of the manifest; a local file of text is found and put under its own name into `folder`."""
    entry = artifact.manifest.calibration
    if entry is None:
        return None
    try:
        spec = CalibrationSpec.model_validate(entry.spec)
    except ValidationError as exc:
        raise VerifyError(f"{artifact.ref}: the manifest's calibration spec is not one that is known here") from exc
    if not find_dataset(spec, folder).is_users_file:
        return spec
    name = spec.dataset
    if Path(name).name != name:
        raise VerifyError(f"{artifact.ref}: the manifest's calibration text {name!r} is no file name")
    bases = (artifact.folder, *artifact.folder.absolute().parents, *Path.cwd().parents, DATA / CALIBRATION)
    found = given or next((path for base in bases if (path := find_path(name, base)) is not None), None)
    if found is None or not found.is_file():
        raise RecipeError(
            f"{artifact.ref}: its calibration text {given or name} is not found",
            hint="say where it is with --calibration PATH",
        )
    (folder / name).symlink_to(found.resolve())
    return spec.model_copy(update={"dataset": str(folder / name)})


def _job(recipe: Recipe, source: PinnedSource, manifest: Manifest, store: Store) -> tuple[VariantJob, Recipe]:
    """The job, and the recipe with the precision that the manifest has.

    The manifest says in which precision the pass ran, the build key what the recipe asked for: `auto`, or the same.
    """
    (job,) = identify_jobs(recipe, source, store)
    if job.refusal is not None:
        raise job.refusal
    if job.build_key != manifest.build_key and recipe.calibration is not None:
        automatic = replace(recipe, calibration=recipe.calibration.model_copy(update={"precision": "auto"}))
        (other,) = identify_jobs(automatic, source, store)
        job = other if other.build_key == manifest.build_key else job
    return job, recipe


def _check_text(
    recipe: Recipe, job: VariantJob, artifact: Artifact, checkpoint: Checkpoint, reporter: Reporter
) -> None:
    """Before the long work: is it the same text? The same build key says so already. Raises VerifyError."""
    entry, spec = artifact.manifest.calibration, recipe.calibration
    if entry is None or spec is None or job.build_key == artifact.manifest.build_key:
        return
    found = summarize_tokens(spec, recipe.path.parent, checkpoint.folder, reporter)
    if found.hash == entry.hash:
        return
    raise VerifyError(
        f"{artifact.ref}: the calibration text is not the one that it was built with: {found.tokens:,} tokens with the "
        f"hash {found.hash[:12]}, the manifest has {entry.tokens:,} with {entry.hash[:12]}",
        hint="`python-docs` needs the same CPython; name a file with --calibration; tokenizers differ by version",
    )


def _check_disk(manifest: Manifest, source: PinnedSource, folder: Path) -> None:
    """Artifact, dequantized source and what is made on the way all lie there at once. Raises PlanError."""
    copies = int(source.is_gguf) + builders()[manifest.format].source_copies
    needed, free = manifest.size_bytes + copies * manifest.source.weights_bytes, disk_free_bytes(folder)
    if needed > free:
        raise PlanError(disk_short(needed, free).message, hint="set TMPDIR, or name another folder with --keep")


def _tool_differences(wanted: dict[str, str], here: dict[str, str]) -> tuple[ToolDifference, ...]:
    return tuple(
        ToolDifference(name, wanted.get(name), here.get(name))
        for name in sorted({*wanted, *here})
        if wanted.get(name) != here.get(name)
    )


def _pass_device(manifest: Manifest, limits: RunLimits, reporter: Reporter) -> str | None:
    """The kind of device that a calibration pass here would run on, to tell before the long work; None: no pass."""
    if manifest.calibration is None or manifest.device is None:
        return None
    return run_step("looking at the processor", reporter, name_device, limits.device)


def _device_difference(manifest: Manifest, here: str | None) -> DeviceDifference | None:
    """None too where the bits depend on no device, or the manifest is older than its record."""
    if manifest.device is None or here is None or here == manifest.device:
        return None
    return DeviceDifference(manifest.device, here)


def _build(recipe: Recipe, job: VariantJob, context: Context, wanted: Manifest, reporter: Reporter) -> Manifest:
    """Fill the folder as a build does; the accepted risk is a person's word, and is taken over."""
    started = time.perf_counter()
    job.builder.check(context.checkpoint, context.options)
    measured: dict[str, Any] = {}
    if job.builder.needs_calibration(context.options):
        folder = context.scratch / "pass"
        folder.mkdir()
        passed = run_pass(recipe, [(job.builder.name, context)], folder, reporter)
        if context.variant in passed.errors:
            raise passed.errors[context.variant]
        context = replace(context, calibration=passed.entry, device=passed.device)
        measured = {"calibration_pass": passed.measurements}
    result = job.builder.build(context, reporter)
    status(reporter, context.variant, "hashing")
    manifest = assemble(recipe, job, context, Made(result, measured, time.perf_counter() - started))
    manifest = manifest.with_risk(wanted.accepted_risk)
    write_text(context.staging / FILE_NAME, manifest.to_json())
    note(reporter, context.variant, f"rebuilt as {manifest.short_digest}")
    return manifest


def _fields(wanted: Manifest, found: Manifest, explained: Sequence[str]) -> tuple[str, ...]:
    one, two = wanted.facts(), found.facts()
    skipped = {*DECIDED_LATER, *explained}
    return tuple(key for key in sorted({*one, *two} - skipped) if one.get(key) != two.get(key))


def _differences(artifact: Artifact, rebuilt: Artifact) -> list[FileDifference]:
    wanted = {entry.path: entry for entry in artifact.manifest.files}
    found = {entry.path: entry for entry in rebuilt.manifest.files}
    differences = []
    for path in sorted({*wanted, *found}):
        if path not in found:
            differences.append(FileDifference(path, "is missing in the rebuilt artifact"))
        elif path not in wanted:
            differences.append(FileDifference(path, "is new in the rebuilt artifact"))
        elif wanted[path].sha256 != found[path].sha256:
            differences.append(_difference(artifact, rebuilt.folder, wanted[path], found[path]))
    return differences


def _difference(artifact: Artifact, rebuilt: Path, wanted: FileEntry, found: FileEntry) -> FileDifference:
    one, two = artifact.folder / wanted.path, rebuilt / found.path
    layout = find_format(artifact.manifest.format).layout
    sizes = f"{found.size_bytes:,} bytes, the artifact's has {wanted.size_bytes:,}"
    what = "differs" if found.size_bytes == wanted.size_bytes else f"has {sizes}"
    if not layout.weight_names([wanted.path]):
        return FileDifference(wanted.path, f"{what}{_first_byte(one, two)}")
    files = layout.read(one), layout.read(two)
    tensors, keys = compare_weights(*files), compare_metadata(*files)
    if keys:
        what += f", metadata {', '.join(keys)}"
    if not tensors and not keys:
        what += ", in its header or the order of its tensors"
    return FileDifference(wanted.path, what, tuple(tensors))


def _first_byte(one: Path, two: Path) -> str:
    if max(one.stat().st_size, two.stat().st_size) > TEXT_BYTES:
        return ""
    pairs = zip(one.read_bytes(), two.read_bytes(), strict=False)
    at = next((index for index, (left, right) in enumerate(pairs) if left != right), None)
    return "" if at is None else f" from byte {at:,}"
