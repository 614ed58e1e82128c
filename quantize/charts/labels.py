"""Places for names beside their dots, so that none lies on another one, a dot or a bar, as far as there is room.

In: for each name its dot, and what is drawn. Out: where its text starts. Greedy, then each once more with all others
known: names are few. The same input gives the same places.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from quantize.charts.svg import text_width

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""

ABOVE, BELOW = 12, 4  # of a text's base line, what its letters take
GAPS = (5, 13, 25, 39, 55, 75)  # between a dot and its name
DIRECTIONS = 12
LEADER = 10  # farther from its dot than this, a name needs a line to it
ROUNDS = 3
FREE = 60  # a place that costs no more is on nothing, and near


@dataclass(frozen=True)
class Label:
    """A name and the dot that it belongs to. reach: half of the dot's width."""

    words: str
    x: float
    y: float
    reach: float


@dataclass(frozen=True)
class Spot:
    """Where the text starts, and the end of a line from the dot to it; None where it stands beside its dot."""

    x: float
    y: float
    leader: tuple[float, float] | None


def place(names: Sequence[Label], drawn: Sequence[Box], inside: Box) -> list[Spot]:
    """A place for each name, the first ones first. drawn: what no name may lie on. inside: where they may stand."""
    boxes: dict[int, Box] = {}
    for _ in range(ROUNDS):
        for index, name in enumerate(names):
            texts = [box for other, box in boxes.items() if other != index]
            leaders = [part for other, box in boxes.items() if other != index for part in _leader(names[other], box)]
            room = _Room(inside, drawn, texts, leaders)
            if index in boxes and room.cost(name, boxes[index]) < FREE:
                continue
            boxes[index] = min(_boxes(name), key=functools.partial(room.cost, name))
    return [_placed(name, boxes[index]) for index, name in enumerate(names)]


@dataclass(frozen=True)
class _Room:
    """Where a name may stand, what is drawn, and the names and lines of the others."""

    inside: Box
    drawn: Sequence[Box]
    texts: Sequence[Box]
    leaders: Sequence[Box]

    def cost(self, name: Label, box: Box) -> float:
        """How bad a place is: outside worst, then on other names, then on what is drawn, then far away."""
        outside = (box[2] - box[0]) * (box[3] - box[1]) - overlap(box, self.inside)
        on_texts = sum(overlap(box, other) for other in (*self.texts, *self.leaders))
        on_texts += sum(overlap(part, other) for part in _leader(name, box) for other in self.texts)
        on_drawn = sum(overlap(box, other) for other in self.drawn)
        x, y = _nearest(name, box)
        return 100 * outside + 40 * on_texts + 10 * on_drawn + math.hypot(x - name.x, y - name.y)


def overlap(one: Box, other: Box) -> float:
    """The area that two boxes share, in square pixels."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    along = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, across) * max(0.0, along)


def along(points: Sequence[tuple[float, float]], step: float = 6) -> Iterator[Box]:
    """Boxes that lie along a line through points."""
    for (x1, y1), (x2, y2) in itertools.pairwise(points):
        count = max(1, round(math.hypot(x2 - x1, y2 - y1) / step))
        for index in range(count + 1):
            x, y = x1 + (x2 - x1) * index / count, y1 + (y2 - y1) * index / count
            yield x - step / 2, y - 1.5, x + step / 2, y + 1.5


def _boxes(name: Label) -> Iterator[Box]:
    wide = text_width(name.words)
    for away in (name.reach + gap for gap in GAPS):
        for step in range(DIRECTIONS):
            turn = 2 * math.pi * step / DIRECTIONS
            x, y = name.x + away * math.cos(turn), name.y - away * math.sin(turn)
            left = x - wide * (1 - math.cos(turn)) / 2  # to the right of the dot it starts there, to the left it ends
            base = y + (ABOVE - BELOW) / 2 - math.sin(turn) * (ABOVE - BELOW) / 2
            yield left, base - ABOVE, left + wide, base + BELOW


def _nearest(name: Label, box: Box) -> tuple[float, float]:
    """The point of a box that is nearest to the dot."""
    return min(max(name.x, box[0]), box[2]), min(max(name.y, box[1]), box[3])


def _placed(name: Label, box: Box) -> Spot:
    return Spot(box[0], box[3] - BELOW, _nearest(name, box) if _is_far(name, box) else None)


def _is_far(name: Label, box: Box) -> bool:
    x, y = _nearest(name, box)
    return math.hypot(x - name.x, y - name.y) - name.reach > LEADER


def _leader(name: Label, box: Box) -> Iterator[Box]:
    """The line from a dot to its name, where it needs one."""
    return along([(name.x, name.y), _nearest(name, box)]) if _is_far(name, box) else iter(())
