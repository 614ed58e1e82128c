"""Plots as inline SVG, drawn by hand: no script, no font, no colour of their own. Colours are CSS classes (c0 … c7).

In: numbers and names. Out: an SVG element as text, every name escaped. Widths are pixels that scale with the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 8
HEAT_STEPS = 10
WIDE, NARROW = 1000, 336
TOP, RIGHT = 14, 14
LABEL_PIXELS = 7.2  # of a character of a label; a guess that is only used to keep labels apart

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """A dot with its name; colour: index of its class."""

    name: str
    x: float
    y: float
    colour: int


@dataclass(frozen=True)
class Range:
    """Three percentiles of one series."""

    name: str
    colour: int
    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class _Scale:
    """Values to pixels, linear or logarithmic; what is outside lies on the edge."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.logarithmic:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / ((high - low) or 1) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the scale."""
        if not self.logarithmic:
            return _round_ticks(self.low, self.high)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1,) if len(powers) > 4 else (1, 2, 5)
        found = [step * 10.0**power for power in powers for step in steps]
        return [value for value in found if self.low <= value <= self.high]


def scatter(points: Sequence[Point], *, x_title: str, y_title: str, limit: float | None, limit_name: str = "") -> str:
    """Dots with labels; y is logarithmic, and what is over the limit is a shaded field. "" without a finite point."""
    points = [item for item in points if math.isfinite(item.x) and math.isfinite(item.y)]
    if not points:
        return ""
    height, left, bottom, right = 380, 64, 328, WIDE - RIGHT
    xs, ys = [item.x for item in points], [item.y for item in points if item.y > 0] + ([limit] if limit else [])
    low = min(ys, default=0.001) / 1.8
    x = _Scale(max(0.0, min(xs) - 0.06 * _extent(xs)), max(xs) + 0.12 * _extent(xs), left, right)
    y = _Scale(low, max([*ys, low * 2]) * 1.8, bottom, TOP, logarithmic=True)
    parts = [_grid(y, left, right), _upright(y_title, bottom), _columns(x, y, x_title, height)]
    placed: list[Box] = []
    if limit:
        placed.append((right - LABEL_PIXELS * len(limit_name), y(limit) - 18, right, y(limit)))
        parts.append(_limit(left, right, y(limit), limit_name))
    placed += [(x(item.x) - 7, y(item.y) - 7, x(item.x) + 7, y(item.y) + 7) for item in points]
    for item in points:
        px, py = x(item.x), y(item.y)
        tx, ty = _free_place(item.name, px, py, placed, right)
        title = escape(f"{item.name}: {item.x:,.1f}, {item.y:.5g}")
        dot = f'<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="6.5"><title>{title}</title></circle>'
        parts.append(f'<g class="c{item.colour % COLOURS}">{dot}</g>{_text("label", tx, ty, item.name)}')
    return _svg(WIDE, height, "".join(parts), f"{y_title} against {x_title}")


def ranges(groups: Sequence[tuple[str, Sequence[Range]]], *, title: str, y_title: str) -> str:
    """For each group, a line from the low to the high percentile of each series, a dot at the low one."""
    values = [value for _, items in groups for item in items for value in (item.low, item.high) if value > 0]
    if not values:
        return ""
    height, left, bottom, right = 250, 52, 200, NARROW - 4
    y = _Scale(min(values) / 1.3, max(values) * 1.3, bottom, TOP, logarithmic=True)
    width = (right - left) / len(groups)
    bands = [f'x="{left + index * width:.1f}" y="{TOP}"' for index in range(1, len(groups), 2)]
    parts = [f'<rect class="band" {at} width="{width:.1f}" height="{bottom - TOP}"/>' for at in bands]
    parts += [_grid(y, left, right), _upright(y_title, bottom)]
    for index, (name, items) in enumerate(groups):
        start = left + index * width
        parts.append(_text("tick", start + width / 2, bottom + 18, name, "middle"))
        parts += [_range(item, start + width * (n + 1) / (len(items) + 1), y) for n, item in enumerate(items)]
    parts.append(_text("axis", (left + right) / 2, height - 8, title, "middle"))
    return _svg(NARROW, height, "".join(parts), f"{y_title}, {title}")


def heatmap(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], title: str) -> str:
    """A field of cells in ten steps on a logarithmic scale; the smallest twentieth of the values share the first."""
    known = sorted(value for row in values for value in row if value)
    if not known:
        return ""
    left, cell, top = 130, 22, 4
    width = (WIDE - RIGHT - left) / max(1, len(columns))
    low = known[len(known) // 20]
    scale = _Scale(low, max(known[-1], low * 1.0001), 0, HEAT_STEPS - 0.001, logarithmic=True)
    parts = []
    for number, (name, row) in enumerate(zip(rows, values, strict=True)):
        y = top + number * cell
        parts.append(_text("tick", left - 8, y + 15, name, "end"))
        for place, value in enumerate(row):
            step = "none" if value is None else f"h{int(scale(value)) if value else 0}"
            hint = f"block {columns[place]}, {name}: {'no figure' if value is None else format(value, '.3%')}"
            size = f'width="{max(1.0, width - 1):.1f}" height="{cell - 1}"'
            at = f'x="{left + place * width:.1f}" y="{y}"'
            parts.append(f'<rect class="{step}" {at} {size}><title>{escape(hint)}</title></rect>')
    base = top + len(rows) * cell
    for place in range(0, len(columns), max(1, round(len(columns) / 16))):
        parts.append(_text("tick", left + (place + 0.5) * width, base + 16, columns[place], "middle"))
    return _svg(WIDE, base + 24, "".join(parts), title)


def _range(item: Range, at: float, y: _Scale) -> str:
    low, middle, high = y(item.low), y(item.middle), y(item.high)
    title = escape(f"{item.name}: {item.low:.3f} s, {item.middle:.3f} s, {item.high:.3f} s")
    lines = [(at, at, low, high), (at - 4, at + 4, high, high), (at - 4, at + 4, middle, middle)]
    drawn = "".join(
        f'<line class="whisker" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>' for x1, x2, y1, y2 in lines
    )
    dot = f'<circle class="dot" cx="{at:.1f}" cy="{low:.1f}" r="4.5"/>'
    return f'<g class="c{item.colour % COLOURS}"><title>{title}</title>{drawn}{dot}</g>'


def _limit(left: float, right: float, at: float, name: str) -> str:
    return (
        f'<rect class="over" x="{left}" y="{TOP}" width="{right - left}" height="{at - TOP:.1f}"/>'
        f'<line class="limit" x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
        + _text("limit-name", right - 6, at - 7, name, "end")
    )


def _grid(y: _Scale, left: float, right: float) -> str:
    return "".join(
        f'<line class="grid" x1="{left:.0f}" x2="{right:.0f}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        + _text("tick", left - 8, y(tick) + 4, _number(tick), "end")
        for tick in y.ticks()
    )


def _columns(x: _Scale, y: _Scale, title: str, height: float) -> str:
    lines = "".join(
        f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{y.end:.0f}" y2="{y.start:.0f}"/>'
        + _text("tick", x(tick), y.start + 18, _number(tick), "middle")
        for tick in x.ticks()
    )
    return lines + _text("axis", (x.start + x.end) / 2, height - 8, title, "middle")


def _text(kind: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _upright(text: str, bottom: float) -> str:
    place = f"translate(13 {(bottom + TOP) / 2:.0f}) rotate(-90)"
    return f'<text class="axis" text-anchor="middle" transform="{place}">{escape(text)}</text>'


def _free_place(name: str, x: float, y: float, placed: list[Box], right: float) -> tuple[float, float]:
    """Where a label beside its dot lies on nothing else, or on least; remembered in `placed`."""
    wide = LABEL_PIXELS * len(name)
    boxes = [(tx, ty - 12, tx + wide, ty + 4) for tx, ty in _places(x, y, wide)]
    inside = [box for box in boxes if box[2] < right and box[0] > 60] or boxes
    box = min(inside, key=lambda item: sum(_overlap(item, other) for other in placed))
    placed.append(box)
    return box[0], box[3] - 4


def _places(x: float, y: float, wide: float) -> Iterator[tuple[float, float]]:
    yield x + 11, y + 4
    yield x - 11 - wide, y + 4
    for away in (16, 28):
        yield x - wide / 2, y - away + 4
        yield x - wide / 2, y + away + 4


def _overlap(one: Box, other: Box) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0])
    along = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, across) * max(0.0, along)


def _extent(values: Iterable[float]) -> float:
    found = list(values)
    return (max(found) - min(found)) or max(abs(found[0]), 1.0)


def _round_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 6 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.10g}"


def _svg(width: float, height: float, inner: str, label: str) -> str:
    kind = "plot wide" if width == WIDE else "plot"
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{inner}</svg>'
    )
