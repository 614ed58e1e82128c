"""How much disk a build takes at its peak, and whether there is room for it.

In: jobs with their sizes, the recipe, the checkpoint's headers, a store and a cache. Out: Needs, in bytes, part by
part; a Room for each file system; the refusal of a build that would fill one. Writes nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.calibration.budget import guide_state_bytes, token_weights_bytes
from quantize.errors import DiskFullError, PlanError, StoreError
from quantize.evaluate.baseline import LIKELIEST
from quantize.evaluate.kinds import text_parts
from quantize.evaluate.text import load_text
from quantize.model.architecture import block_count
from quantize.model.checkpoint import Checkpoint
from quantize.model.config import number_or
from quantize.model.folder_files import CARRIED_FILES
from quantize.model.source import PinnedSource
from quantize.recipe.model import Recipe
from quantize.store.staging import PASS, STAGING, leftovers
from quantize.system.files import existing_parent
from quantize.system.sizes import size_text

if TYPE_CHECKING:
    from quantize.build.job import VariantJob

PAPERS_BYTES = 100_000  # manifest, recipe, card, measurements, evaluation page of one artifact, about
CHARACTERS_PER_TOKEN = 3.5  # of held-out text, which is not tokenized for a plan
TEMPORARY_BYTES = 256 << 20  # more than the headers and the tokenizer of any model
MEMORY_FOLDER = Path("/dev/shm")
WIDEST_HIDDEN = 16_384
GRAM_RATIO = 4  # of the Gram matrices that a variant may keep, and more, to a 16-bit source
LARGEST_RATIO = 8  # of a 16-bit file to a quantized one of the same model


@dataclass(frozen=True)
class Needs:
    """Bytes that a build writes into the store and the cache.

    source: a GGUF source, dequantized. baseline: the source's side of the evaluation. states: hidden states of the
    calibration pass, one copy. guide: of guided statistics, until the pass begins; token_weights: what stays of them
    until it ends. passed: of the artifacts, what the pass writes; before_last: before its last block.
    artifacts: everything in the artifacts' folders. intermediates: what variants share. passing: beside an artifact
    while it is built, of the one that takes most. scratch: beside the artifacts from the pass on.
    """

    source: int = 0
    baseline: int = 0
    states: int = 0
    guide: int = 0
    token_weights: int = 0
    passed: int = 0
    before_last: int = 0
    artifacts: int = 0
    intermediates: int = 0
    passing: int = 0
    scratch: int = 0

    @property
    def pass_bytes(self) -> int:
        """In the store while the pass runs: both copies of the states stand together until the last block."""
        solving = max(2 * self.states + self.before_last, self.states + self.passed)
        return self.scratch + self.token_weights + max(self.guide, solving)

    @property
    def making_bytes(self) -> int:
        """In the store while the last variant is made."""
        return self.scratch + self.artifacts + self.passing

    @property
    def store_bytes(self) -> int:
        """At the peak in the store."""
        return max(self.pass_bytes, self.making_bytes)

    @property
    def cache_bytes(self) -> int:
        """At the peak in the cache."""
        return self.source + self.baseline + self.intermediates

    @property
    def peak_bytes(self) -> int:
        """In both together. The shared file is made after the pass; all else stays to the end."""
        return self.source + self.baseline + max(self.pass_bytes, self.making_bytes + self.intermediates)


@dataclass(frozen=True)
class Room:
    """A file system that a build writes to: `what` of it is there, the bytes needed at the peak, and those free.

    Free is also what stopped builds of the same variants left, which this one goes on with or removes.
    """

    what: str
    path: Path
    needed_bytes: int
    free_bytes: int

    @property
    def missing_bytes(self) -> int:
        """How much must be freed; 0 for none."""
        return max(0, self.needed_bytes - self.free_bytes)


def needs(
    jobs: Sequence[VariantJob], recipe: Recipe, checkpoint: Checkpoint, *, source_bytes: int, measured: bool
) -> Needs:
    """What the jobs that are to be built need. source_bytes: of what is dequantized first. measured: as gates do."""
    todo = [job for job in jobs if job.is_open and job.size is not None]
    if not todo:
        return Needs()
    sizes = [job.size for job in todo if job.size is not None]
    shared = {size.intermediate_key: size.intermediate_bytes for size in sizes}
    measured = measured and any(job.is_measurable for job in todo)
    calibrated = any(job.is_calibrated for job in todo)
    passed, blocks = sum(size.pass_bytes for size in sizes), block_count(checkpoint.config) if calibrated else 1
    states = states_bytes(recipe, number_or(checkpoint.config, "hidden_size", 0)) if calibrated else 0
    spec = recipe.calibration
    guided = calibrated and spec is not None and spec.guided
    return Needs(
        source=source_bytes,
        baseline=baseline_bytes(recipe, number_or(checkpoint.config, "vocab_size", LIKELIEST)) if measured else 0,
        states=states,
        guide=guide_state_bytes(blocks, states) if guided else 0,
        token_weights=token_weights_bytes(checkpoint.config, spec.tokens) if guided and spec else 0,
        passed=passed,
        before_last=passed * (blocks - 1) // blocks,
        artifacts=sum(size.file_bytes + carried_bytes(checkpoint) + PAPERS_BYTES for size in sizes),
        intermediates=sum(shared.values()),
        passing=max(size.passing_bytes for size in sizes),
        scratch=sum(size.scratch_bytes for size in sizes),
    )


def most_bytes(jobs: Sequence[VariantJob], recipe: Recipe, source: PinnedSource, *, measured: bool) -> int:
    """More than the jobs can need, from file sizes alone: where so much is free, nothing has to be sized."""
    if recipe.calibration is not None and recipe.calibration.guided and any(job.is_calibrated for job in jobs):
        return sys.maxsize  # by blocks, which headers tell
    weights = sum(file.size_bytes for file in source.files) * (LARGEST_RATIO if source.quantized_before else 1)
    artifacts = sum(2 * weights + PAPERS_BYTES for _ in jobs)  # in float32 it is twice a 16-bit source
    artifacts += sum(GRAM_RATIO * weights for job in jobs if job.is_calibrated)
    baseline = baseline_bytes(recipe, LIKELIEST) if measured else 0
    return 2 * weights + weights * source.is_derived + artifacts + baseline + 2 * states_bytes(recipe, WIDEST_HIDDEN)


def states_bytes(recipe: Recipe, hidden: int) -> int:
    """One block's hidden states, float32, if every sequence is as long as it may be."""
    spec = recipe.calibration
    return 4 * (spec.tokens if spec else 0) * hidden


def carried_bytes(checkpoint: Checkpoint) -> int:
    """Licence files, which go along with every artifact."""
    found = {path for pattern in CARRIED_FILES for path in checkpoint.folder.glob(pattern) if path.is_file()}
    return sum(path.stat().st_size for path in found)


def baseline_bytes(recipe: Recipe, vocabulary: int) -> int:
    """The likeliest tokens and their log-probabilities (8 bytes each) for each prediction, by the text's length; twice,
    for the source in the runtime of an artifact has its own.
    """
    spec, extent = recipe.evaluation, recipe.evaluation.extent
    tokens = 0.0
    for part in text_parts(spec.text, recipe.path.parent, spec.column):
        if part.is_questions:
            tokens += extent.questions * extent.answer_tokens
            continue
        text = load_text(part.address, Path(), column=spec.column)
        lengths = [len(document) / CHARACTERS_PER_TOKEN for document in text.documents]
        windows = [min(1.0, length / extent.window) for length in lengths]
        if text.stream:
            windows = [min(sum(lengths) / extent.window, extent.windows or part.windows or math.inf)]
        tokens += sum(windows[: extent.windows or None]) * extent.window
    return int(2 * tokens * (8 * min(LIKELIEST, vocabulary) + 8))


def rooms(needed: Needs, store: Path, cache: Path, name: str, variants: Iterable[str]) -> tuple[Room, ...]:
    """The file systems that the store and the cache are on, or will be. name, variants: of what is to be built.

    Raises StoreError: one can't be asked.
    """
    held = [path for variant in (*variants, PASS) for path in _staged(store, name, variant)]
    in_store, in_cache = _allocated(held), _allocated(cache.glob("*/.*.tmp"))
    if existing_parent(store).stat().st_dev == existing_parent(cache).stat().st_dev:
        return (Room("store and cache", store, needed.peak_bytes, disk_free_bytes(store) + in_store + in_cache),)
    return (
        Room("store", store, needed.store_bytes, disk_free_bytes(store) + in_store),
        Room("cache", cache, needed.cache_bytes, disk_free_bytes(cache) + in_cache),
    )


def refusal(found: Sequence[Room]) -> PlanError | None:
    """Why there is not room enough; None if there is."""
    for room in found:
        if room.missing_bytes:
            return disk_short(room.needed_bytes, room.free_bytes, room.what)
    return None


def disk_short(needed: int, free: int, what: str = "build") -> PlanError:
    """The refusal of a build that would fill the disk."""
    missing = needed - free
    return PlanError(
        f"the disk is too small for the {what}: {size_text(needed)} are needed at the peak, "
        f"{size_text(free)} are free, {missing:,} bytes are missing",
        hint=f"free {size_text(missing)}, build fewer variants with --only, or choose another --store or "
        "QUANTIZE_CACHE",
    )


def disk_free_bytes(root: Path) -> int:
    """Bytes free where the store is or will be. Raises StoreError."""
    try:
        return shutil.disk_usage(existing_parent(root)).free
    except OSError as exc:
        raise StoreError(f"store {root}: {exc.strerror}") from exc


def temporary_root() -> Path:
    """A folder for temporary files with some room: the system's own, or one in memory. Raises DiskFullError."""
    places = [MEMORY_FOLDER]
    with contextlib.suppress(OSError):  # where none can be written to, Python finds none
        places.insert(0, Path(tempfile.gettempdir()))
    for place in places:
        if place.is_dir() and os.access(place, os.W_OK) and shutil.disk_usage(place).free >= TEMPORARY_BYTES:
            return place
    hint = f"free {size_text(TEMPORARY_BYTES)} there, or set TMPDIR to another folder"
    raise DiskFullError(f"no room for temporary files in {' or '.join(map(str, places))}", hint=hint)


def _staged(store: Path, name: str, variant: str) -> list[Path]:
    return leftovers(store, name, variant) if (store / STAGING).is_dir() else []


def _allocated(folders: Iterable[Path]) -> int:
    """Bytes on disk below some folders; what vanishes meanwhile is none."""
    total = 0
    for path in (item for folder in folders for item in folder.rglob("*")):
        with contextlib.suppress(OSError):
            total += path.lstat().st_blocks * 512
    return total
