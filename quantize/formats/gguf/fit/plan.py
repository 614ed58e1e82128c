"""What is known of a fitted file before the calibration pass: its budget, the smallest file, stock maps that fit.

In: a Survey. Out: a SizePlan whose bytes are the most that the file may take.
"""

from __future__ import annotations

from quantize.formats.base import SizePlan
from quantize.formats.gguf.fit.survey import Survey
from quantize.system.sizes import size_text

UNGUIDED = "without `guided: true` in the calibration all matrices count alike: with it types are chosen better"


def planned(
    surveyed: Survey, tensors: int, intermediate_bytes: int, intermediate_key: str, *, guided: bool
) -> SizePlan:
    """The largest file that may come of it. guided: the statistics are.

    Raises UsageError: none fits, with the least that would.
    """
    most = min(surveyed.budget.file_bytes, surveyed.sizes.most_bytes)
    weights = most - surveyed.frame.header_bytes
    return SizePlan(
        most, weights, tensors, round(8 * weights / surveyed.frame.elements, 4), (), intermediate_bytes,
        intermediate_key, at_most=True, notes=(*notes(surveyed), *(() if guided else (UNGUIDED,))),
    )  # fmt: skip


def notes(surveyed: Survey) -> tuple[str, ...]:
    """Sentences for people."""
    budget, sizes = surveyed.budget, surveyed.sizes
    points = sizes.stock_points()
    within = [name for name, point in points.items() if point.bytes <= budget.file_bytes]
    above = [name for name in points if name not in within]
    near = [*within[-3:], *above[:2]]
    shown = ", ".join(f"{name} {size_text(points[name].bytes)}" for name in near)
    most = "" if budget.file_bytes <= sizes.most_bytes else ", which is all that Q8_0 takes"
    return (
        f"at most {budget.file_bytes:,} bytes: {budget.words}{most}",
        f"{len(sizes.matrices)} matrices have a choice; the smallest file has {sizes.least_bytes:,} bytes",
        f"llama.cpp's own maps near it: {shown}",
        "types are chosen after the calibration pass, by what their errors cost there",
    )
