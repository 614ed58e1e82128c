"""Whether an artifact is measured on text that it was calibrated on.

In: windows of held-out text, the calibration text of the artifact. Out: a sentence that says how it is known that they
share nothing, or RefusedError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantize.calibration.mix import CalibrationText
from quantize.calibration.text import load_dataset, load_tokenizer, parts_left_out
from quantize.errors import CheckpointError
from quantize.evaluate.text import Windows, check_disjoint
from quantize.recipe.calibration import Calibration

CHANGED = "not compared: it is no longer the text that the artifact was calibrated on"


@dataclass(frozen=True)
class CalibratedOn:
    """Calibration text: its spec, where its relative paths start, and the hash over its token ids if it is known; of a
    mix, that of each part.
    """

    spec: Calibration
    base: Path
    hash: str | None = None
    part_hashes: tuple[str, ...] = ()


def hold_against(windows: Sequence[Windows], seen: CalibratedOn | None, folder: Path) -> str:
    """Compare every dataset but those that the model writes itself. folder: of the model, for its tokenizer.

    Raises RefusedError: they share text. RecipeError, PlanError: the calibration text can't be read.
    """
    if seen is None:
        return "none was used"
    text = CalibrationText(seen.spec, seen.base)
    reasons = list(dict.fromkeys(item.not_compared for item in text.datasets if item.not_compared is not None))
    hashes = seen.part_hashes or (seen.hash,) * len(text.datasets)
    if len(hashes) != len(text.datasets):
        return CHANGED
    sequences: list[tuple[int, ...]] = []
    try:
        left_out = parts_left_out(text, folder)
        rows = zip(text.datasets, hashes, left_out, strict=True)
        compared = [(item, known) for item, known, why in rows if item.not_compared is None and why is None]
        tokenizer = load_tokenizer(folder) if compared else None
        for dataset, known in compared:
            found = load_dataset(dataset, folder, tokenizer)
            if known is not None and found.hash != known:
                return CHANGED
            sequences += found.token_ids
    except CheckpointError as exc:
        return f"not compared: {exc.message}"
    if not sequences:
        return "; ".join(reasons)
    for item in windows:
        check_disjoint(item, sequences)
    said = f"compared with {sum(map(len, sequences)):,} tokens in {len(sequences)} sequences, disjoint"
    return "; ".join([said, *(f"beside it {reason}" for reason in reasons)])
