"""Bytes against predicted loss: the curve of chosen files, other maps as dots on it, and what was measured.

In: points in bytes and in the unit of the loss. Out: an SVG element as text, every name escaped; "" without a curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from quantize.charts.svg import RIGHT, TOP, WIDE, Scale, level_lines, line, svg, text, upright, upright_lines

HEIGHT, LEFT, BELOW = 330, 64, 44
UNIT = 1e6
CHOSEN, STOCK, MEASURED = 0, 1, 2  # classes of colors


@dataclass(frozen=True)
class Dot:
    """A file. loss: predicted, or measured."""

    name: str
    size_bytes: int
    loss: float


def curve(chosen: Sequence[Dot], others: Sequence[Dot], measured: Sequence[Dot], *, y_title: str) -> str:
    """A line through the chosen files; dots for the others and for what was measured, each with its name."""
    drawn = [dot for dot in (*chosen, *others, *measured) if dot.loss > 0]
    if len(chosen) < 2 or not drawn:
        return ""
    sizes, losses = [dot.size_bytes / UNIT for dot in drawn], [dot.loss for dot in drawn]
    bottom, margin = HEIGHT - BELOW, (max(sizes) - min(sizes)) / 20 or 1.0
    x = Scale(min(sizes) - margin, max(sizes) + 2 * margin, LEFT, WIDE - RIGHT)
    y = Scale(min(losses) / 1.3, max(losses) * 1.3, bottom, TOP, logarithmic=True)
    parts = [level_lines(y, LEFT, WIDE - RIGHT), upright_lines(x, y), upright(y_title, (bottom + TOP) / 2)]
    parts.append(text("axis", (LEFT + WIDE - RIGHT) / 2, HEIGHT - 6, "size of the file, MB", "middle"))
    places = [(x(dot.size_bytes / UNIT), y(dot.loss)) for dot in chosen if dot.loss > 0]
    joined = "".join(line("whisker", *one, *other) for one, other in pairwise(places))
    parts.append(f'<g class="c{CHOSEN}">{joined}</g>')
    for colour, dots in ((STOCK, others), (MEASURED, measured)):
        parts += [_dot(dot, x(dot.size_bytes / UNIT), y(dot.loss), colour) for dot in dots if dot.loss > 0]
    return svg(WIDE, HEIGHT, "".join(parts), f"{y_title} against size")


def _dot(dot: Dot, x: float, y: float, colour: int) -> str:
    title = escape(f"{dot.name}: {dot.size_bytes:,} bytes, {dot.loss:.4g}")
    mark = f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    return f'<g class="c{colour}"><title>{title}</title>{mark}</g>' + text("tick", x + 7, y - 5, dot.name)
