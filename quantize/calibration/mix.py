"""What a recipe calibrates on -> its datasets, one or several, and what pins them together.

In: a CalibrationSpec or a CalibrationMix, where relative paths start. Out: datasets, the spec pinned, as manifests have
it and as build keys do. Reading and tokenizing is left to text.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quantize.calibration.datasets import Dataset, find_dataset
from quantize.events import Reporter
from quantize.model.checkpoint import Checkpoint
from quantize.recipe.calibration import SHARED_KEYS, Calibration, CalibrationMix
from quantize.runtimes.devices import CPU


@dataclass(frozen=True)
class CalibrationText:
    """The text of a recipe; a spec of one dataset is a mix of one. base: where relative paths start.

    device: that a model runs on which writes some of it.
    """

    spec: Calibration
    base: Path
    device: str = CPU

    @cached_property
    def datasets(self) -> tuple[Dataset, ...]:
        """One for each part, in their order."""
        return tuple(find_dataset(part, self.base, self.device) for part in self.spec.parts)

    @property
    def names(self) -> tuple[str, ...]:
        """What the parts are called in manifests."""
        return tuple(str(dataset.stated()["dataset"]) for dataset in self.datasets)

    def pin(self, reporter: Reporter) -> Calibration:
        """The spec with all that may move on resolved. Raises as Dataset.pin does."""
        return self.spec.with_parts([dataset.pin(reporter) for dataset in self.datasets])

    def stated(self) -> dict[str, Any]:
        """The spec as manifests have it: nothing in it depends on this machine."""
        return self._merged([dataset.stated() for dataset in self.datasets])

    def identify(self) -> dict[str, Any]:
        """What pins the text before it is read, as build keys have it. Raises as Dataset.content does.

        The parameters of the source, by which a part may be left out, are pinned by the source.
        """
        return self._merged([dataset.identify() for dataset in self.datasets])

    def left_out(self, parameters: int) -> tuple[str | None, ...]:
        """For each part, why a source of so many parameters goes without it; None: it doesn't."""
        return tuple(
            f"the source has {parameters:,} parameters, and the mix takes it up to {limit:,}"
            if limit is not None and parameters > limit
            else None
            for limit in self.spec.limits
        )

    def is_written_by(self, checkpoint: Checkpoint) -> bool:
        """Whether the model, held in memory whole, writes a part of the text for itself."""
        parts = zip(self.datasets, self.left_out(checkpoint.parameters), strict=True)
        return any(dataset.holds_the_model and why is None for dataset, why in parts)

    def _merged(self, facts: list[dict[str, Any]]) -> dict[str, Any]:
        """What is said of the parts as one: what all share, once."""
        if not isinstance(self.spec, CalibrationMix):
            (only,) = facts
            return only
        parts = [
            {key: value for key, value in said.items() if key not in SHARED_KEYS} | {"up_to_parameters": limit}
            for said, limit in zip(facts, self.spec.limits, strict=True)
        ]
        return {**self.spec.model_dump(mode="json", exclude={"mix"}), "mix": parts}
