"""One variant of a recipe on its way: what it is, what is there already, what keeps it from being built.

In: what plan finds. Out: plain data for disk, plan and execute.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quantize.errors import PlanError, QuantizeError
from quantize.formats import builders, known_format
from quantize.formats.base import Builder, SizePlan
from quantize.model.architecture import check_gradient
from quantize.model.checkpoint import Checkpoint
from quantize.recipe.calibration import Calibration
from quantize.recipe.model import Variant
from quantize.store.artifact import ASIDE, Artifact
from quantize.system.digest import canonical_hash


@dataclass(frozen=True)
class VariantJob:
    """One variant of the recipe: its identity, and what is known before any work.

    inputs: all that goes into the build key, {} where there is none. existing: a build of that key, in its place or
    aside, that stands for it.
    """

    variant: Variant
    inputs: dict[str, Any]
    tools: dict[str, str]
    existing: Artifact | None = None
    size: SizePlan | None = None
    refusal: QuantizeError | None = None

    @property
    def name(self) -> str:
        """The variant's."""
        return self.variant.name

    @property
    def builder(self) -> Builder[Any]:
        """Who builds it."""
        return builders()[self.variant.format]

    @property
    def is_calibrated(self) -> bool:
        """Whether it takes part in the calibration pass."""
        return self.builder.needs_calibration(self.variant.options)

    @property
    def is_measurable(self) -> bool:
        """Whether a runtime is known to measure it in."""
        return known_format(self.variant.format).is_measurable

    @property
    def is_open(self) -> bool:
        """Neither built nor refused."""
        return self.existing is None and self.refusal is None

    @property
    def is_up_to_date(self) -> bool:
        """Built, and in its place: not refused by its gates, nor still to be held to them."""
        return self.existing is not None and self.existing.folder.parent.name not in ASIDE

    def check(self, checkpoint: Checkpoint, calibration: Calibration | None) -> None:
        """Raise PlanError or CheckpointError for what headers say can't be done."""
        self.builder.check(checkpoint, self.variant.options)
        if calibration is not None and calibration.guided and self.is_calibrated:
            check_gradient(checkpoint.config)

    @cached_property
    def build_key(self) -> str:
        """Hex sha256 of the inputs; "" where there are none."""
        return canonical_hash(self.inputs) if self.inputs else ""


def no_calibration(variant: str) -> PlanError:
    """The refusal of a variant that needs calibration text, of a recipe that has none."""
    return PlanError(
        f"variant {variant} needs calibration, and the recipe has none",
        hint="add `calibration: starter`",
    )
