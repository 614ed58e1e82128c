"""How much disk a build takes at its peak, from what is known before it starts.

In: jobs with their sizes, the recipe, the checkpoint's headers. Out: Needs, in bytes, part by part. What is free, and
what follows from it, is plan's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantize.checkpoint import CARRIED_FILES, Checkpoint
from quantize.evaluate.baseline import LIKELIEST
from quantize.evaluate.runtimes import FORMATS
from quantize.evaluate.text import load_text
from quantize.recipe import Recipe

if TYPE_CHECKING:
    from quantize.plan import Job

PAPERS_BYTES = 100_000  # manifest, recipe, card, measurements, evaluation page of one artifact, about
CHARACTERS_PER_TOKEN = 3.5  # of held-out text, which is not tokenized for a plan


@dataclass(frozen=True)
class Needs:
    """Bytes that a build writes into the store and the cache.

    source: a GGUF source, dequantized. baseline: the source's side of the evaluation. states: hidden states of the
    calibration pass, both copies. artifacts: everything in the artifacts' folders. intermediates: what variants share.
    """

    source: int = 0
    baseline: int = 0
    states: int = 0
    artifacts: int = 0
    intermediates: int = 0

    @property
    def peak_bytes(self) -> int:
        """Hidden states are gone when the shared file is made; all else stays to the end."""
        return self.source + self.baseline + self.artifacts + max(self.states, self.intermediates)


def needs(jobs: Sequence[Job], recipe: Recipe, checkpoint: Checkpoint, *, source_bytes: int, measured: bool) -> Needs:
    """What the jobs that are to be built need. source_bytes: of what is dequantized first. measured: as gates do."""
    todo = [job for job in jobs if job.existing is None and job.size is not None and job.refusal is None]
    if not todo:
        return Needs()
    sizes = [job.size for job in todo if job.size is not None]
    shared = {size.intermediate_key: size.intermediate_bytes for size in sizes}
    measured = measured and any(job.variant.format in FORMATS for job in todo)
    calibrated = any(job.backend.needs_calibration(job.variant.options) for job in todo)
    return Needs(
        source=source_bytes,
        baseline=baseline_bytes(recipe, checkpoint) if measured else 0,
        states=2 * states_bytes(recipe, checkpoint) if calibrated else 0,
        artifacts=sum(size.file_bytes + carried_bytes(checkpoint) + PAPERS_BYTES for size in sizes),
        intermediates=sum(shared.values()),
    )


def states_bytes(recipe: Recipe, checkpoint: Checkpoint) -> int:
    """One block's hidden states, float32, if every sequence is as long as it may be."""
    spec = recipe.calibration
    tokens = spec.samples * spec.sequence_length if spec else 0
    return 4 * tokens * int(checkpoint.config.get("hidden_size", 0))


def carried_bytes(checkpoint: Checkpoint) -> int:
    """Licence files, which go along with every artifact."""
    found = {path for pattern in CARRIED_FILES for path in checkpoint.folder.glob(pattern) if path.is_file()}
    return sum(path.stat().st_size for path in found)


def baseline_bytes(recipe: Recipe, checkpoint: Checkpoint) -> int:
    """The likeliest tokens and their log-probabilities (8 bytes each) for each prediction, by the text's length."""
    spec = recipe.evaluation
    text = load_text(spec.text, recipe.path.parent, column=spec.column)
    lengths = [len(document) / CHARACTERS_PER_TOKEN for document in text.documents]
    windows = [sum(lengths) / spec.window] if text.stream else [min(1.0, length / spec.window) for length in lengths]
    if spec.windows:
        windows = [min(windows[0], spec.windows)] if text.stream else windows[: spec.windows]
    kept = min(LIKELIEST, int(checkpoint.config.get("vocab_size") or LIKELIEST))
    return int(sum(windows) * spec.window * (8 * kept + 8))
