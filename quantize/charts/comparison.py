"""A comparison as the chart of size against loss.

In: a Comparison. Out: an SVG element for a page, or a file of its own; "" where nothing was measured.
"""

from __future__ import annotations

import math

from quantize.charts.quality import Mark, QualityChart, State, draw, draw_file
from quantize.evaluate.comparison import FIGURE, Comparison, Contender
from quantize.evaluate.metrics import metric


def comparison_chart(found: Comparison) -> str:
    """For a page that has the colors of the artifacts, by their place in the comparison."""
    return draw(_chart(found))


def comparison_file(found: Comparison, name: str) -> str:
    """For itself. name: of the model."""
    chosen = found.chosen
    parts = [f"Take {chosen.variant}." if chosen else "", "The lower and the further left, the better."]
    if found.text:
        parts.append(f"{found.predictions:,} predicted tokens of {found.text}.")
    return draw_file(_chart(found), f"{name}, quantized: size against loss", " ".join(filter(None, parts)))


def _chart(found: Comparison) -> QualityChart:
    figure = metric(FIGURE)
    marks = tuple(
        _mark(item, item.mean_kl, index, found)
        for index, item in enumerate(found.artifacts)
        if item.mean_kl is not None
    )
    where = " on the worst kind" if any(item.worst is not None for item in marks) else ""
    name = f"limit: {found.limit:g} {figure.unit}{where}" if found.limit is not None else ""
    return QualityChart(marks, figure.title_with_unit, found.limit, name)


def _mark(item: Contender, loss: float, index: int, found: Comparison) -> Mark:
    interval, worst = item.mean_kl_interval, item.worst
    if interval is not None and not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        interval = None
    if worst is not None and not math.isfinite(worst.mean_kl):
        worst = None
    return Mark(
        name=item.variant,
        size_bytes=item.size_bytes,
        loss=loss,
        low=None if interval is None else interval.low,
        high=None if interval is None else interval.high,
        worst=None if worst is None else worst.mean_kl,
        kind="" if worst is None else worst.kind,
        state=_state(item, found),
        is_taken=item.digest == found.taken,
        colour=index,
    )


def _state(item: Contender, found: Comparison) -> State:
    if item.is_on_front:
        return State.FRONT
    accepted = item.verdict.is_accepted or (found.taken is None and item.beaten_by is not None)
    return State.BEATEN if accepted else State.REFUSED
