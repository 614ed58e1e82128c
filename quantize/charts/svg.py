"""What charts are drawn with: scales, ticks, lines and text of SVG.

In: numbers and names. Out: pieces of SVG as text, every name escaped. Colors are CSS classes, which a page's style
sheet or style.css here knows. Widths are pixels that scale with the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

COLOURS = 8
WIDE, NARROW = 1000, 336
TOP, RIGHT = 14, 14
FONT_SIZE = 12.5
_NARROW_LETTERS = frozenset("fijlrtI.,:;'|!()[]/- ")
_WIDE_LETTERS = frozenset("mwMW%@")
_LETTER, _NARROW_LETTER, _WIDE_LETTER = 0.60, 0.36, 0.92  # of the font size, of a bold sans serif; a little generous


@dataclass(frozen=True)
class Scale:
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
        """Round values inside the scale: at least three on a logarithmic one, where there are any."""
        if not self.logarithmic:
            return round_ticks(self.low, self.high)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found: list[float] = []
        for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            all_values = [float(f"{step}e{power}") for power in powers for step in steps]
            found = [value for value in all_values if self.low <= value <= self.high]
            if len(found) >= 3:
                break
        return found


def round_ticks(low: float, high: float) -> list[float]:
    """Some six round values between two."""
    rough = (high - low) / 6 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def extent(values: Iterable[float]) -> float:
    """How far apart values are; never 0."""
    found = list(values)
    return (max(found) - min(found)) or max(abs(found[0]), 1.0)


def number(value: float) -> str:
    """A tick's text."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.10g}"


def text_width(text: str, size: float = FONT_SIZE) -> float:
    """Pixels that a text takes, about: whoever shows the chart has a font of their own."""
    return size * sum(
        _NARROW_LETTER if letter in _NARROW_LETTERS else _WIDE_LETTER if letter in _WIDE_LETTERS else _LETTER
        for letter in text
    )


def fitting(words: str, width: float, size: float = FONT_SIZE) -> str:
    """A text that takes at most so many pixels: what does not fit is cut off, and "…" says so."""
    if text_width(words, size) <= width:
        return words
    while words and text_width(f"{words}…", size) > width:
        words = words[:-1]
    return f"{words.rstrip()}…"


def text(kind: str, x: float, y: float, words: str, anchor: str = "start") -> str:
    """Text of a class. anchor: start, middle or end."""
    return f'<text class="{kind}" text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """A straight line of a class."""
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def upright(words: str, middle: float) -> str:
    """The title of an upright axis."""
    place = f"translate(13 {middle:.0f}) rotate(-90)"
    return f'<text class="axis" text-anchor="middle" transform="{place}">{escape(words)}</text>'


def level_lines(y: Scale, left: float, right: float) -> str:
    """Level lines with their values."""
    return "".join(
        line("grid", left, y(tick), right, y(tick)) + text("tick", left - 8, y(tick) + 4, number(tick), "end")
        for tick in y.ticks()
    )


def upright_lines(x: Scale, y: Scale) -> str:
    """Upright lines with their values below."""
    return "".join(
        line("grid", x(tick), y.end, x(tick), y.start) + text("tick", x(tick), y.start + 18, number(tick), "middle")
        for tick in x.ticks()
    )


def svg(width: float, height: float, inner: str, label: str) -> str:
    """A chart inside of a page. label: what a screen reader says."""
    kind = "plot wide" if width == WIDE else "plot"
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{inner}</svg>'
    )
