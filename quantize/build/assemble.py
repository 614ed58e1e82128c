"""Everything that an artifact has beside its weights: manifest, recipe, model card, licences, measurements.

In: a recipe, a VariantJob, a staging folder that a builder has filled. Out: the papers, in the folder, and the
Manifest, which is written by whoever puts the folder in its place.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from quantize.build.job import VariantJob
from quantize.formats.base import BuildResult, Context
from quantize.model.checkpoint import Checkpoint
from quantize.model.folder_files import CARRIED_FILES
from quantize.model.source import PinnedSource
from quantize.recipe.model import Recipe
from quantize.store.artifact import describe_files, write_measurements
from quantize.store.manifest import (
    CARD_NAME,
    RECIPE_NAME,
    SCHEMA_VERSION,
    FileEntry,
    KeptEntry,
    LeftOutEntry,
    Manifest,
    SourceEntry,
    StoredEntry,
)
from quantize.system.files import write_text


@dataclass(frozen=True)
class Made:
    """What a builder wrote, what was measured on the way, and the seconds that it took."""

    result: BuildResult
    measured: Mapping[str, Any]
    seconds: float


def assemble(recipe: Recipe, job: VariantJob, context: Context, made: Made) -> Manifest:
    """Write the papers into the staging folder and return the manifest. Raises OSError."""
    from quantize.provenance.card import render_card  # late: it can draw

    staging = context.staging
    names = (*made.result.files, *_carry_papers(context))
    files = describe_files(staging, tuple(dict.fromkeys(names)))
    manifest = _manifest(recipe, job, context, made.result, files)
    write_text(staging / RECIPE_NAME, recipe.text)
    write_text(staging / CARD_NAME, render_card(manifest))
    measurements = {
        "built_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "build_seconds": round(made.seconds, 2),
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "threads": context.limits.threads,
        },
        **made.measured,
        **made.result.measurements,
    }
    write_measurements(staging, measurements)
    return manifest


def _carry_papers(context: Context) -> list[str]:
    """Copy the licence files of the base model: they must go wherever its weights go."""
    names = []
    for pattern in CARRIED_FILES:
        for path in sorted(context.checkpoint.folder.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, context.staging / path.name)
                names.append(path.name)
    return names


def _manifest(
    recipe: Recipe, job: VariantJob, context: Context, result: BuildResult, files: tuple[FileEntry, ...]
) -> Manifest:
    checkpoint = context.checkpoint
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=recipe.name,
        variant=job.variant.name,
        format=job.variant.format,
        options=job.variant.normalized(),
        bits=result.bits,
        group_size=result.group_size,
        bits_per_weight=result.bits_per_weight,
        weights_bytes=result.weights_bytes,
        source=_source_entry(context.source, checkpoint),
        calibration=context.calibration,
        tools=job.tools,
        device=result.device or context.device,
        files=files,
        kept_in_high_precision=tuple(
            KeptEntry(tensor=item.tensor, type=item.type, reason=item.reason) for item in result.kept
        ),
        size_bytes=sum(item.size_bytes for item in files),
        build_key=job.build_key,
        left_out=tuple(LeftOutEntry(tensor=item.tensor, reason=item.reason) for item in result.left_out),
        stored=None if result.stored is None else StoredEntry(type=result.stored.type, reason=result.stored.reason),
    ).sealed()


def _source_entry(source: PinnedSource, checkpoint: Checkpoint) -> SourceEntry:
    return SourceEntry(
        uri=source.uri,
        revision=source.revision,
        name=source.name,
        base_model=source.base_model,
        license=source.license,
        architecture=checkpoint.architecture,
        parameters=checkpoint.parameters,
        weights_bytes=checkpoint.weights_bytes,
        quantized_before=source.quantized_before,
        mended=source.mending.remarks if source.mending else (),
        files=tuple(FileEntry(path=item.path, size_bytes=item.size_bytes, sha256=item.sha256) for item in source.files),
    )
