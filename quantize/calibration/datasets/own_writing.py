"""`self`: text that the model writes itself, each after an opening of seed_prompts.txt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from quantize.calibration.datasets.base import Dataset, TokenIds

NAME = "self"


class OwnWriting(Dataset):
    """Token ids that the model samples; pinned by the openings, the spec's seed and the model."""

    made_to_spec: ClassVar[bool] = True
    holds_the_model: ClassVar[bool] = True
    not_compared: ClassVar[str | None] = "the model's own writing, which is not compared"

    def knows(self) -> bool:
        """One name."""
        return self.spec.dataset == NAME

    def rows(self, model: Path) -> Iterable[TokenIds]:
        """As many as the spec has samples, of its length each. Loads the whole model."""
        from quantize.runtimes.sampling import sample_from_model

        spec = self.spec
        rows = sample_from_model(model, seed_prompts(), spec.samples, spec.sequence_length, spec.seed)
        return [tuple(ids) for ids in rows]

    def content(self) -> str:
        """Hex sha256 of the openings."""
        return hashlib.sha256("\n".join(seed_prompts()).encode()).hexdigest()


def seed_prompts() -> list[str]:
    """Openings after which a model writes its own calibration text."""
    path = Path(__file__).with_name("seed_prompts.txt")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
