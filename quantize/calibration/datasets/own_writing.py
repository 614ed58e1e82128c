"""`self`: text that the model writes itself, each after an opening of seed_prompts.txt."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

from quantize.calibration.datasets.base import Dataset, TokenIds

Writer = Callable[[Path, list[str], int, int, int, str], list[list[int]]]
"""(model, prompts, samples, sequence length, seed, device) -> token ids of each sample."""


class OwnWriting(Dataset):
    """Token ids that the model samples; pinned by the openings, the spec's seed and the model."""

    name: ClassVar[str] = "self"
    made_to_spec: ClassVar[bool] = True
    holds_the_model: ClassVar[bool] = True
    not_compared: ClassVar[str | None] = "the model's own writing, which is not compared"

    def knows(self) -> bool:
        """One name."""
        return self.spec.dataset == self.name

    def prompts(self) -> list[str]:
        """The openings."""
        return seed_prompts()

    def writer(self) -> Writer:
        """Texts that go on from an opening."""
        from quantize.runtimes.sampling import sample_from_model

        return sample_from_model

    def rows(self, model: Path) -> Iterable[TokenIds]:
        """As many as the spec has samples, of its length each. Loads the whole model."""
        spec = self.spec
        rows = self.writer()(model, self.prompts(), spec.samples, spec.sequence_length, spec.seed, self.device)
        return [tuple(ids) for ids in rows]

    def content(self) -> str:
        """Hex sha256 of what the model is given."""
        return hashlib.sha256("\n".join(self.prompts()).encode()).hexdigest()


def seed_prompts() -> list[str]:
    """Openings after which a model writes its own calibration text."""
    return lines_of("seed_prompts.txt")


def lines_of(name: str) -> list[str]:
    """The lines of a file beside this one that are not empty."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip()]
