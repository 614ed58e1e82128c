"""Size against loss: a dot for each artifact, with the interval of its figure, its worst kind of text, and the front.

In: marks in bytes and in the unit of the figure. Out: an SVG element for a page, or a file of its own. What a mark is
is told by its shape, not by its color alone; both axes follow the data, and the loss is on a logarithmic one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from html import escape
from importlib import resources

from quantize.charts.labels import Box, Label, Spot, along, overlap, place
from quantize.charts.svg import (
    COLOURS,
    RIGHT,
    TOP,
    WIDE,
    Scale,
    extent,
    fitting,
    level_lines,
    line,
    text,
    text_width,
    upright,
    upright_lines,
)

HEIGHT, LEFT, BELOW = 420, 64, 92  # BELOW: the axis and the legend
HEAD, HEAD_SIZE = 62, 19  # of a file of its own: title and remark
MARGIN = 20
MAX_NAMES = 60
"""Dots that have their names beside them: more than any recipe has, and a bound for what comes from elsewhere."""
LARGEST = 1e100
"""A loss that is more has no place."""
SPAN = 500.0
FAR = 20  # times the largest figure: a limit beyond that would leave no room for the figures
"""What is smaller than the largest by more lies on the lower edge, with its figure beside its name."""
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


class State(StrEnum):
    """What an artifact is among the others, in the words of the legend."""

    FRONT = "on the front"
    BEATEN = "beaten by one that is no larger"
    REFUSED = "not accepted by its gates"


@dataclass(frozen=True)
class Mark:
    """One artifact. low, high: of the loss's interval, None without one. worst, kind: the loss on the worst kind of
    text, None where there is but one. colour: index of its class.
    """

    name: str
    size_bytes: int
    loss: float
    low: float | None
    high: float | None
    worst: float | None
    kind: str
    state: State
    is_taken: bool
    colour: int


@dataclass(frozen=True)
class QualityChart:
    """What is drawn. y_title: the figure, with its unit. limit: of the gate; limit_name: what stands at its line."""

    marks: tuple[Mark, ...]
    y_title: str
    limit: float | None
    limit_name: str

    @property
    def title(self) -> str:
        """What it is, in a line."""
        return f"{self.y_title} against size"

    @property
    def drawn(self) -> tuple[Mark, ...]:
        """The marks that have a place."""
        return tuple(item for item in self.marks if item.loss <= LARGEST and not math.isnan(item.loss))


def draw(chart: QualityChart) -> str:
    """An SVG element for a page that has the classes' colors; "" without a finite figure."""
    if not chart.drawn:
        return ""
    return _element(chart, HEIGHT, _plot(chart, 0), "", "plot wide")


def draw_file(chart: QualityChart, title: str, remark: str) -> str:
    """A file of its own with a title and a line below it, colors for light and dark, and a ground; "" as above."""
    if not chart.drawn:
        return ""
    wide = WIDE - 2 * MARGIN
    head = text("head", MARGIN, 30, fitting(title, wide, HEAD_SIZE)) + text("remark", MARGIN, 50, fitting(remark, wide))
    ground = '<rect class="ground" width="100%" height="100%"/>'
    size = f' width="{WIDE}" height="{HEIGHT + HEAD}"'
    inner = f"<style>{_style()}</style>{ground}{head}{_plot(chart, HEAD)}"
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{_element(chart, HEIGHT + HEAD, inner, size, "plot")}\n'


@functools.cache
def _style() -> str:
    return resources.files("quantize.charts").joinpath("style.css").read_text(encoding="utf-8")


def _element(chart: QualityChart, height: float, inner: str, size: str, kind: str) -> str:
    described = f'<title id="quality-title">{escape(chart.title)}</title>'
    described += f'<desc id="quality-desc">{escape(" ".join(f"{_told(item)}." for item in chart.drawn))}</desc>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{kind}"{size} viewBox="0 0 {WIDE} {height}" role="img" '
        f'aria-labelledby="quality-title" aria-describedby="quality-desc">{described}{inner}</svg>'
    )


def _plot(chart: QualityChart, top: float) -> str:
    marks = chart.drawn
    divisor, unit = _unit(marks)
    right, bottom = WIDE - RIGHT, HEIGHT + top - BELOW
    sizes = [item.size_bytes / divisor for item in marks]
    x = Scale(max(0.0, min(sizes) - 0.08 * extent(sizes)), max(sizes) + 0.12 * extent(sizes), LEFT, right)
    y = _loss_scale(chart, bottom, top + TOP)
    places = [(x(size), y(item.loss)) for size, item in zip(sizes, marks, strict=True)]
    parts = [level_lines(y, LEFT, right), upright_lines(x, y), upright(chart.y_title, (bottom + top + TOP) / 2)]
    parts.append(text("axis", (LEFT + right) / 2, bottom + 38, f"size, {unit}", "middle"))
    boxes = [box for item, at in zip(marks, places, strict=True) for box in _boxes(item, at, y)]
    parts.append(_limit(chart, y, right, boxes))
    steps = _front_points(marks, places)
    parts.append(_front_line(steps))
    boxes += along(steps)
    parts += [_mark(item, at, y) for item, at in zip(marks, places, strict=True)]
    parts.append(_names(marks, places, y, boxes, (LEFT + 4, top + TOP + 2, right - 2, bottom - 4)))
    parts.append(_legend(chart, bottom + 62))
    return "".join(parts)


def _unit(marks: Sequence[Mark]) -> tuple[float, str]:
    largest = max(item.size_bytes for item in marks)
    return next(((divisor, unit) for divisor, unit in UNITS if largest >= divisor), UNITS[-1])


def _loss_scale(chart: QualityChart, start: float, end: float) -> Scale:
    marks = chart.drawn
    values = [value for item in marks for value in (item.loss, item.low, item.high, item.worst)]
    known = [value for value in values if value is not None and 0 < value <= LARGEST] or [0.001]
    if chart.limit is not None and 0 < chart.limit <= FAR * max(known):
        known.append(chart.limit)
    high = max(known) * 1.7
    return Scale(max(min(known) / 1.7, high / SPAN), high, start, end, logarithmic=True)


# --- one artifact -----------------------------------------------------------------------------------------------------


def _mark(item: Mark, at: tuple[float, float], y: Scale) -> str:
    px, py = at
    parts = [f"<title>{escape(_told(item))}</title>"]
    if item.worst is not None and item.worst > 0:
        parts.append(line("far", px, py, px, y(item.worst)) + _diamond(px, y(item.worst)))
    if item.low is not None and item.high is not None:
        parts.append(_bar(px, y(max(item.low, y.low)), y(max(item.high, y.low))))
    if item.is_taken:
        parts.append(f'<circle class="ring" cx="{px:.1f}" cy="{py:.1f}" r="11.5"/>')
    return f'<g class="c{item.colour % COLOURS}">{"".join(parts)}{_dot(item.state, px, py)}</g>'


def _dot(state: State, x: float, y: float) -> str:
    if state is State.REFUSED:
        path = f'd="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10"'
        return f'<path class="halo" {path}/><path class="cross" {path}/>'
    kind = "dot" if state is State.FRONT else "open"
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="6"/>'


def _bar(x: float, low: float, high: float) -> str:
    caps = line("whisker", x - 5, low, x + 5, low) + line("whisker", x - 5, high, x + 5, high)
    return line("whisker", x, low, x, high) + caps


def _diamond(x: float, y: float) -> str:
    return f'<path class="worst" d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z"/>'


def _told(item: Mark) -> str:
    """A mark in words."""
    give = "" if item.low is None or item.high is None else f" (between {item.low:.4g} and {item.high:.4g})"
    worst = "" if item.worst is None else f", at worst {item.worst:.4g} on {item.kind}"
    state = "the one to take" if item.is_taken else item.state.value
    return f"{item.name}: {item.size_bytes / 1e6:,.1f} MB, {item.loss:.4g}{give}{worst}, {state}"


def _boxes(item: Mark, at: tuple[float, float], y: Scale) -> Iterator[Box]:
    """What a mark takes."""
    px, py = at
    reach = _reach(item)
    yield px - reach, py - reach, px + reach, py + reach
    if item.low is not None and item.high is not None:
        yield px - 5, y(max(item.high, y.low)), px + 5, y(max(item.low, y.low))
    if item.worst is not None and item.worst > 0:
        yield px - 6, min(py, y(item.worst) - 6), px + 6, max(py, y(item.worst) + 6)


def _reach(item: Mark) -> float:
    """Half of the width of a dot, with its ring."""
    return 13 if item.is_taken else 7


# --- all of them ------------------------------------------------------------------------------------------------------


def _limit(chart: QualityChart, y: Scale, right: float, boxes: list[Box]) -> str:
    """The field over the limit, and its name, on whichever end of the line is free; remembered in `boxes`."""
    if chart.limit is None or chart.limit <= 0:
        return ""
    if chart.limit > y.high:
        said = f"{chart.limit_name}, above the scale"
        spot = (right - 6 - text_width(said), y.end, right - 6, y.end + 20)
        boxes.append(spot)
        return text("limit-name", right - 6, y.end + 16, said, "end")
    at, wide = y(chart.limit), text_width(chart.limit_name)
    above = at - 7 if at - 22 > y.end else at + 17
    ends = {"end": right - 6, "start": LEFT + 8.0}
    spots = {
        anchor: (x - wide * (anchor == "end"), above - 12, x + wide * (anchor == "start"), above + 4)
        for anchor, x in ends.items()
    }
    best = min(ends, key=lambda anchor: sum(overlap(spots[anchor], other) for other in boxes))
    boxes += [spots[best], (LEFT, at - 1, right, at + 1)]
    field = f'<rect class="over" x="{LEFT}" y="{y.end:.1f}" width="{right - LEFT:.1f}" height="{at - y.end:.1f}"/>'
    return field + line("limit", LEFT, at, right, at) + text("limit-name", ends[best], above, chart.limit_name, best)


def _front_points(marks: Sequence[Mark], places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those on the front that no smaller one undercuts, even within the noise."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(at for item, at in zip(marks, places, strict=True) if item.state is State.FRONT):
        if not found or y > found[-1][1]:
            found.append((x, y))
    return found


def _front_line(points: Sequence[tuple[float, float]]) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="front" points="{path}"/>' if len(points) > 1 else ""


def _names(
    marks: Sequence[Mark], at: Sequence[tuple[float, float]], y: Scale, boxes: Sequence[Box], inside: Box
) -> str:
    states = list(State)
    order = sorted(range(len(marks)), key=lambda index: (not marks[index].is_taken, states.index(marks[index].state)))
    order = order[:MAX_NAMES]
    names = [Label(_called(marks[index], y), *at[index], _reach(marks[index])) for index in order]
    places = place(names, boxes, inside)
    kinds = ["label taken" if marks[index].is_taken else "label" for index in order]
    return "".join(
        _leader(name, spot) + text(kind, spot.x, spot.y, name.words)
        for name, spot, kind in zip(names, places, kinds, strict=True)
    )


def _called(item: Mark, y: Scale) -> str:
    return item.name if item.loss > y.low else f"{item.name}: {item.loss:.2g}, below the scale"


def _leader(name: Label, spot: Spot) -> str:
    return "" if spot.leader is None else line("leader", name.x, name.y, *spot.leader)


def _legend(chart: QualityChart, y: float) -> str:
    """What each shape means, of those that there are."""
    marks, x, parts = chart.drawn, float(LEFT), []
    for shape, words in _meanings(marks):
        wide = 26 + text_width(words)
        if x > LEFT and x + wide > WIDE - RIGHT:
            x, y = float(LEFT), y + 20
        parts.append(f'<g class="key">{shape(x + 8, y - 4)}</g>' + text("tick", x + 20, y, words))
        x += wide + 14
    return "".join(parts)


def _meanings(marks: Sequence[Mark]) -> Iterator[tuple[Callable[[float, float], str], str]]:
    if any(item.is_taken for item in marks):
        yield _ringed, "take this one"
    for state in State:
        if any(item.state is state for item in marks):
            yield functools.partial(_dot, state), state.value
    if any(item.low is not None for item in marks):
        yield _short_bar, "95 % interval"
    if any(item.worst is not None for item in marks):
        yield _diamond, "worst kind of text, which the limit is for"


def _ringed(x: float, y: float) -> str:
    rings = (("ring", 8), ("dot", 4))
    return "".join(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>' for kind, radius in rings)


def _short_bar(x: float, y: float) -> str:
    return _bar(x, y + 6, y - 6)
