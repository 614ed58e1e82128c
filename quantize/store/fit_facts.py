"""What measurements.json has of an artifact whose types were chosen so that it fits.

In: measurements. Out: FitFacts: bytes against predicted loss, and the point that was taken; which matrices were solved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from quantize.errors import some_of

NAME = "fit"
NAMED = 3  # of several, where people read


class FitPoint(BaseModel):
    """A file of so many bytes, and what it is predicted to lose."""

    model_config = ConfigDict(frozen=True)
    bytes: int
    loss: float


class FitMeasured(BaseModel):
    """Mean KL divergence in nats a token, of the chosen types and of the best stock map of no more bytes."""

    model_config = ConfigDict(frozen=True)
    chosen_kl: float
    stock_kl: float
    tokens: int


class FitFacts(BaseModel):
    """asked: what must fit. taken: `fitted`, or the stock map that was measured to be better. against: the best stock
    map of no more bytes. types: how many matrices have each. unit: of losses: `nats` a token, or `share` of the
    outputs' energy. curve: bytes and loss of chosen files. stock: name -> bytes and loss.
    """

    model_config = ConfigDict(frozen=True)
    asked: str
    budget_bytes: int
    taken: str
    against: str | None
    measured: FitMeasured | None
    point: FitPoint
    bound: float
    unit: str
    types: Mapping[str, int]
    curve: tuple[tuple[int, float], ...]
    stock: Mapping[str, tuple[int, float]]

    @property
    def words(self) -> str:
        """For people."""
        types = ", ".join(f"{count} {kind}" for kind, count in self.types.items())
        text = f"To fit: {self.asked}; {self.point.bytes:,} of {self.budget_bytes:,} bytes. Types: {types}. "
        if self.measured is None:
            return text + "Not measured against a type map of llama.cpp's own."
        kl = self.measured
        text += f"Mean KL on {kl.tokens:,} tokens of the package's own held-out text: {kl.chosen_kl:.4g} with the "
        text += f"chosen types, {kl.stock_kl:.4g} with {self.against}, the best stock map of no more bytes"
        return f"{text}, which was taken." if self.taken != "fitted" else f"{text}."

    @property
    def unit_words(self) -> str:
        """What losses are."""
        return "nats a token" if self.unit == "nats" else "share of the outputs' energy"

    @property
    def rows(self) -> list[tuple[int, float, str]]:
        """Bytes, predicted loss and what it is, by size: the curve, and llama.cpp's own maps."""
        found = [(size, loss, "chosen") for size, loss in self.curve]
        found += [(size, loss, name) for name, (size, loss) in self.stock.items()]
        return sorted([*found, (self.point.bytes, self.point.loss, "this file")])


def read_fit(measurements: Mapping[str, Any]) -> FitFacts | None:
    """What there is of it; None for an artifact that was not fitted, or one that can't be read."""
    try:
        return FitFacts.model_validate(measurements.get(NAME))
    except ValidationError:
        return None


def solved_words(measurements: Mapping[str, Any]) -> str | None:
    """How many matrices of a GGUF file were solved, and which were not and why; None where none was to be."""
    unsolved, layers = measurements.get("unsolved"), measurements.get("layers")
    if not isinstance(unsolved, Mapping) or not isinstance(layers, Mapping):
        return None
    reasons: dict[str, list[str]] = {}
    for name, why in unsolved.items():
        reasons.setdefault(str(why), []).append(str(name))
    left = [f"{len(names)} not: {some_of(sorted(names), NAMED)}: {why}" for why, names in sorted(reasons.items())]
    return "; ".join([f"{len(layers)} matrices solved", *left])
