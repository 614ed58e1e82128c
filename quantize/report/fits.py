"""What a report says of artifacts whose types were chosen so that they fit.

In: entries. Out: for each such artifact the curve of bytes against predicted loss, and sentences.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantize.charts.curve import Dot, curve
from quantize.report.collect import MeasuredArtifact
from quantize.store.fit_facts import FitFacts, read_fit

TITLES = {"nats": "predicted loss, nats a token", "share": "predicted error, share of the outputs' energy"}


@dataclass(frozen=True)
class FitView:
    """The curve of one artifact, and in words."""

    variant: str
    svg: str
    text: str


def fit_view(entry: MeasuredArtifact) -> FitView | None:
    """None for an artifact that was not fitted."""
    facts = read_fit(entry.measurements)
    if facts is None:
        return None
    chosen = [Dot("chosen types", size, loss) for size, loss in facts.curve]
    stock = [Dot(name, size, loss) for name, (size, loss) in facts.stock.items()]
    measured = _measured(entry, facts) if facts.unit == "nats" else []
    svg = curve(chosen, stock, measured, y_title=TITLES.get(facts.unit, "predicted loss"))
    return FitView(entry.variant, svg, facts.words)


def _measured(entry: MeasuredArtifact, facts: FitFacts) -> list[Dot]:
    """Mean KL divergences: of the check that chose, and of the evaluation."""
    found = []
    if facts.measured is not None and facts.against is not None and facts.against in facts.stock:
        found.append(Dot(f"{facts.against}, measured", facts.stock[facts.against][0], facts.measured.stock_kl))
        if facts.taken == "fitted":
            found.append(Dot("chosen, measured", facts.point.bytes, facts.measured.chosen_kl))
    if entry.quality is not None:
        found.append(Dot(f"{entry.variant}, evaluated", facts.point.bytes, entry.quality.mean_kl))
    return found
