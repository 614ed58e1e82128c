"""One variant of a recipe on its way: what it is, what is there already, what keeps it from being built.

In: what plan finds. Out: plain data for disk, plan and execute.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quantize.errors import QuantizeError
from quantize.formats.base import Builder, SizePlan
from quantize.recipe.model import Variant
from quantize.store.artifact import Artifact
from quantize.system.digest import canonical_hash


@dataclass(frozen=True)
class VariantJob:
    """One variant of the recipe: its identity, and what is known before any work.

    inputs: all that goes into the build key, {} where there is none.
    """

    variant: Variant
    builder: Builder[Any]
    inputs: dict[str, Any]
    tools: dict[str, str]
    existing: Artifact | None = None
    size: SizePlan | None = None
    refusal: QuantizeError | None = None

    @property
    def is_open(self) -> bool:
        """Neither built nor refused."""
        return self.existing is None and self.refusal is None

    @cached_property
    def build_key(self) -> str:
        """Hex sha256 of the inputs; "" where there are none."""
        return canonical_hash(self.inputs) if self.inputs else ""
