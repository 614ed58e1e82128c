"""The smaller charts of a page: percentiles as ranges, and values as a heat map.

In: numbers and names. Out: an SVG element as text, every name escaped; "" where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from quantize.charts.svg import COLOURS, NARROW, RIGHT, TOP, WIDE, Scale, level_lines, svg, text, upright

HEAT_STEPS = 10


@dataclass(frozen=True)
class Range:
    """Three percentiles of one series. colour: index of its class."""

    name: str
    colour: int
    low: float
    middle: float
    high: float


def ranges(groups: Sequence[tuple[str, Sequence[Range]]], *, title: str, y_title: str) -> str:
    """For each group, a line from the low to the high percentile of each series, a dot at the low one."""
    values = [value for _, items in groups for item in items for value in (item.low, item.high) if value > 0]
    if not values:
        return ""
    height, left, bottom, right = 250, 52, 200, NARROW - 4
    y = Scale(min(values) / 1.3, max(values) * 1.3, bottom, TOP, logarithmic=True)
    width = (right - left) / len(groups)
    bands = [f'x="{left + index * width:.1f}" y="{TOP}"' for index in range(1, len(groups), 2)]
    parts = [f'<rect class="band" {at} width="{width:.1f}" height="{bottom - TOP}"/>' for at in bands]
    parts += [level_lines(y, left, right), upright(y_title, (bottom + TOP) / 2)]
    for index, (name, items) in enumerate(groups):
        start = left + index * width
        parts.append(text("tick", start + width / 2, bottom + 18, name, "middle"))
        parts += [_range(item, start + width * (n + 1) / (len(items) + 1), y) for n, item in enumerate(items)]
    parts.append(text("axis", (left + right) / 2, height - 8, title, "middle"))
    return svg(NARROW, height, "".join(parts), f"{y_title}, {title}")


def heatmap(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], title: str) -> str:
    """A field of cells in ten steps on a logarithmic scale; the smallest twentieth of the values share the first."""
    known = sorted(value for row in values for value in row if value)
    if not known:
        return ""
    left, cell, top = 130, 22, 4
    width = (WIDE - RIGHT - left) / max(1, len(columns))
    low = known[len(known) // 20]
    scale = Scale(low, max(known[-1], low * 1.0001), 0, HEAT_STEPS - 0.001, logarithmic=True)
    parts = []
    for number, (name, row) in enumerate(zip(rows, values, strict=True)):
        y = top + number * cell
        parts.append(text("tick", left - 8, y + 15, name, "end"))
        for place, value in enumerate(row):
            step = "none" if value is None else f"h{int(scale(value)) if value else 0}"
            hint = f"block {columns[place]}, {name}: {'no figure' if value is None else format(value, '.3%')}"
            size = f'width="{max(1.0, width - 1):.1f}" height="{cell - 1}"'
            at = f'x="{left + place * width:.1f}" y="{y}"'
            parts.append(f'<rect class="{step}" {at} {size}><title>{escape(hint)}</title></rect>')
    base = top + len(rows) * cell
    for place in range(0, len(columns), max(1, round(len(columns) / 16))):
        parts.append(text("tick", left + (place + 0.5) * width, base + 16, columns[place], "middle"))
    return svg(WIDE, base + 24, "".join(parts), title)


def _range(item: Range, at: float, y: Scale) -> str:
    low, middle, high = y(item.low), y(item.middle), y(item.high)
    title = escape(f"{item.name}: {item.low:.3f} s, {item.middle:.3f} s, {item.high:.3f} s")
    lines = [(at, at, low, high), (at - 4, at + 4, high, high), (at - 4, at + 4, middle, middle)]
    drawn = "".join(
        f'<line class="whisker" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>' for x1, x2, y1, y2 in lines
    )
    dot = f'<circle class="dot" cx="{at:.1f}" cy="{low:.1f}" r="4.5"/>'
    return f'<g class="c{item.colour % COLOURS}"><title>{title}</title>{drawn}{dot}</g>'
